"""A gradient times a factor that is nearly always 1, in place. The kernel does not touch the gradient for 1."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LaunchConfig, make_config, row_strides
from .launch import Launch, over_rows, prepared
from .row_tiles import SIZES, load_tile, row_offset, store_tile
from .sizes import cdiv

# about eight on each processor of today's GPUs: each program reads the factor, and most have nothing else to do
PROGRAMS = 1024


@triton.jit(do_not_specialize=[*SIZES, "tiles"])
def scale_kernel(
    tensor, factor, tiles, L, V, stride_b, stride_l, LANES: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr
):
    """tiles: of all rows together. Each program takes every n-th of them, if there are n programs."""
    b_factor = tl.load(factor).to(tl.float32)
    if b_factor == 1:
        return
    V = V // ALIGN * ALIGN
    per_row = tl.cdiv(V, LANES * VEC)
    for i in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        p_row = tensor + row_offset(i // per_row, L, stride_b, stride_l, ALIGN)
        b_x = load_tile(p_row, i % per_row, V, LANES, VEC).to(tl.float32)
        store_tile(p_row, b_x * b_factor, i % per_row, V, LANES, VEC)


def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor.

    tensor: [B, L, V] or [T, V] with any outer strides, or [V].
    factor: one float, on the device of tensor.
    """
    _scale(torch.atleast_2d(tensor), factor)


@prepared
def _scale(tensor: Tensor, factor: Tensor) -> Launch:
    length, *strides = row_strides(tensor)
    size = tensor.shape[-1]
    config = launch_config(size, tensor.dtype)
    tiles = tensor.shape[:-1].numel() * cdiv(size, config.tile)
    grid = (min(tiles, PROGRAMS),)
    return over_rows(scale_kernel, grid, tiles, length, size, *strides, config=config, rows=(tensor,))


def launch_config(vocab_size: int, dtype: torch.dtype) -> LaunchConfig:
    """Two 128-bit accesses in flight for each thread."""
    return make_config(vocab_size, dtype, threads=512, per_thread=32 // dtype.itemsize)
