"""GPU backend of softmax: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.rows import matrices_of, moved_back, moved_last
from ...common.triton.alignment import aligned
from ...common.triton.config import LaunchConfig, is_whole, make_config, sizes_of
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.numbers import LOG2E, exponent
from ...common.triton.row_softmax import sums_of_row
from ...common.triton.row_tiles import load_terms, load_tile, row_offset, row_pointer, store_tile, unspecialized


@triton.jit
def softmax_tile(b_x, shift, log_sum, scale, LOG: tl.constexpr):
    b_x = b_x.to(tl.float32) - shift
    if LOG:
        return b_x - log_sum
    return tl.exp2(exponent(b_x, LOG2E)) * scale


@unspecialized()
def softmax_fwd_kernel(
    x,
    out,
    L,
    V,
    stride_b,
    stride_l,
    out_stride_b,
    out_stride_l,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    p_row = row_pointer(x, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    p_out = row_pointer(out, row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN), ALIGN)
    shift, row_sum, _, b_x = sums_of_row(p_row, V, None, None, LOG2E, LANES, VEC, ONE_TILE)
    log_sum, scale = tl.log(row_sum), 1.0 / row_sum
    i_last = tl.cdiv(V, LANES * VEC) - 1
    if not ONE_TILE:
        for i_tile in range(i_last):
            b_next = load_tile(p_row, i_tile + 1, V, LANES, VEC, EVICT="evict_first")
            store_tile(p_out, softmax_tile(b_x, shift, log_sum, scale, LOG), i_tile, V, LANES, VEC, EVICT="evict_first")
            b_x = b_next
    store_tile(p_out, softmax_tile(b_x, shift, log_sum, scale, LOG), i_last, V, LANES, VEC, EVICT="evict_first")


@triton.jit
def load_both(p_grad, p_output, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr):
    return load_terms(p_grad, i_tile, V, LANES, VEC), load_terms(p_output, i_tile, V, LANES, VEC)


@triton.jit
def gradient_of_softmax(b_g, b_y, row_sum, LOG: tl.constexpr):
    """d x = p (g - sum(p g)) for a softmax p; d x = g - e^q sum(g) for a log-softmax q."""
    if LOG:
        return b_g - tl.exp2(exponent(b_y, LOG2E)) * row_sum
    return b_y * (b_g - row_sum)


@unspecialized()
def softmax_bwd_kernel(
    grad,
    output,
    out,
    L,
    V,
    stride_b,
    stride_l,
    output_stride_b,
    output_stride_l,
    out_stride_b,
    out_stride_l,
    LOG: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    p_grad = row_pointer(grad, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    p_output = row_pointer(output, row_offset(i_t, L, output_stride_b, output_stride_l, ALIGN), ALIGN)
    p_out = row_pointer(out, row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN), ALIGN)
    b_sum = tl.zeros([LANES], tl.float32)
    i_last = tl.cdiv(V, LANES * VEC) - 1
    if not ONE_TILE:
        for i in range(i_last):  # from the end, so that the second reading finds a full tile in the cache
            b_g, b_y = load_both(p_grad, p_output, i_last - i, V, LANES, VEC)
            b_sum += tl.sum(b_g if LOG else b_g * b_y, 1)
    b_g, b_y = load_both(p_grad, p_output, 0, V, LANES, VEC)
    b_sum += tl.sum(b_g if LOG else b_g * b_y, 1)
    row_sum = tl.sum(b_sum, 0)
    store_tile(p_out, gradient_of_softmax(b_g, b_y, row_sum, LOG), 0, V, LANES, VEC)
    if not ONE_TILE:
        for i in range(i_last):
            b_g, b_y = load_both(p_grad, p_output, i + 1, V, LANES, VEC)
            store_tile(p_out, gradient_of_softmax(b_g, b_y, row_sum, LOG), i + 1, V, LANES, VEC)


def forward(x: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """softmax of x along `dim`, or its logarithm if `log`. dtype: of the result; the dtype of x, or float32."""
    x = moved_last(x, dim)
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    if x.numel():
        rows, out_rows = matrices_of(x, out)
        _forward(aligned(rows, forward_config(x.shape[-1], x.dtype).vec), out_rows, log=log)
    return moved_back(out, dim)


@prepared
def _forward(x: Tensor, out: Tensor, *, log: bool) -> Launch:
    size = x.shape[-1]
    config = forward_config(size, x.dtype)
    return over_rows(
        softmax_fwd_kernel,
        (x.shape[:-1].numel(),),
        *sizes_of(x, out),
        LOG=log,
        ONE_TILE=size <= config.tile,
        config=config,
        rows=(x, out),
    )


def backward(grad: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """d x along `dim`, from the gradient of the output and the output, which have one dtype.

    dtype: of x and of d x; the dtype of the output, or a 16-bit dtype.
    d x is contiguous along `dim`, because autograd takes a gradient of any strides.
    """
    grad, output = moved_last(grad, dim), moved_last(output, dim)
    out = torch.empty_like(grad, dtype=dtype, memory_format=torch.contiguous_format)
    if grad.numel():
        grad_rows, output_rows, out_rows = matrices_of(grad, output, out)
        vec = backward_config(grad.shape[-1], dtype).vec
        _backward(aligned(grad_rows, vec), aligned(output_rows, vec), out_rows, log=log)
    return out.movedim(-1, dim)


@prepared
def _backward(grad: Tensor, output: Tensor, out: Tensor, *, log: bool) -> Launch:
    size = grad.shape[-1]
    config = backward_config(size, out.dtype)
    return over_rows(
        softmax_bwd_kernel,
        (grad.shape[:-1].numel(),),
        *sizes_of(grad, output, out),
        LOG=log,
        ONE_TILE=size <= config.tile,
        config=config,
        rows=(grad, output, out),
    )


def forward_config(size: int, dtype: torch.dtype) -> LaunchConfig:
    """At most 1,024 threads of 64 registers, which hold the float32 values of a tile and the next tile."""
    per_thread = 16 if is_whole(size, dtype) else 8
    if size > 1024 * per_thread:
        per_thread //= 2
    return make_config(size, dtype, threads=1024, per_thread=per_thread)


def backward_config(size: int, dtype: torch.dtype) -> LaunchConfig:
    """As in the forward, with two input tensors. dtype: of the output, which is the narrowest tensor."""
    return make_config(size, dtype, threads=1024, per_thread=8 if is_whole(size, dtype) else 4)
