"""A gradient times a factor that is nearly always 1, in place. The kernel does not touch the gradient for 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, launch, make_config, row_strides
from .row_tiles import SIZES, load_tile, row_offset, store_tile


@triton.jit(do_not_specialize=SIZES)
def scale_kernel(tensor, factor, L, V, stride_b, stride_l, LANES: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr):
    b_factor = tl.load(factor).to(tl.float32)
    if b_factor == 1:
        return
    V = V // ALIGN * ALIGN
    p_row = tensor + row_offset(tl.program_id(0).to(tl.int64), L, stride_b, stride_l, ALIGN)
    for i_tile in range(tl.cdiv(V, LANES * VEC)):
        b_x = load_tile(p_row, i_tile, V, LANES, VEC).to(tl.float32)
        store_tile(p_row, b_x * b_factor, i_tile, V, LANES, VEC)


def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor.

    tensor: [B, L, V] or [T, V] with any outer strides, or [V].
    factor: one float, on the device of tensor.
    """
    tensor = torch.atleast_2d(tensor)
    length, *strides = row_strides(tensor)
    launch(
        scale_kernel,
        (tensor.shape[:-1].numel(),),
        tensor,
        factor,
        length,
        tensor.shape[-1],
        *strides,
        config=launch_config(tensor.shape[-1], tensor.dtype),
        rows=(tensor,),
    )


def launch_config(vocab_size: int, dtype: torch.dtype) -> LaunchConfig:
    """One program per row rather than per tile: with a factor of 1, fewer programs start and end."""
    return make_config(vocab_size, dtype, threads=512, per_thread=32 // dtype.itemsize)
