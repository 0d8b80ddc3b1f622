"""GPU backend of rms_norm: one program per row; for d weight, one per block of rows and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.rows import matrices_of
from ...common.triton.alignment import aligned, aligned_vector
from ...common.triton.columns import column_tile, over_columns, rows_per_block
from ...common.triton.config import LaunchConfig, is_whole, make_config, sizes_of
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.row_tiles import load_terms, multiple, row_offset, row_pointer, store_tile, unspecialized
from ...common.triton.sizes import cdiv
from ..mean.triton import reduce_column_blocks


@triton.jit
def weighted(b_x, weight, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr):
    if weight is not None:
        b_x *= load_terms(weight, i_tile, V, LANES, VEC)
    return b_x


@unspecialized(aligned=["weight"])
def rms_norm_fwd_kernel(
    x,
    weight,
    out,
    rstd,
    eps,
    L,
    V,
    stride_b,
    stride_l,
    out_stride_b,
    out_stride_l,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    p_row = row_pointer(x, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    p_out = row_pointer(out, row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN), ALIGN)
    b_squares = tl.zeros([LANES], tl.float32)
    i_last = tl.cdiv(V, LANES * VEC) - 1
    if not ONE_TILE:
        for i in range(i_last):  # from the end, so that the second reading finds a full tile in the cache
            b_x = load_terms(p_row, i_last - i, V, LANES, VEC)
            b_squares += tl.sum(b_x * b_x, 1)
    b_x = load_terms(p_row, 0, V, LANES, VEC)
    b_squares += tl.sum(b_x * b_x, 1)
    b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_squares, 0) / V + eps)
    tl.store(rstd + i_t, b_rstd)
    store_tile(p_out, weighted(b_x * b_rstd, weight, 0, V, LANES, VEC), 0, V, LANES, VEC)
    if not ONE_TILE:
        for i in range(i_last):
            b_x = load_terms(p_row, i + 1, V, LANES, VEC)
            store_tile(p_out, weighted(b_x * b_rstd, weight, i + 1, V, LANES, VEC), i + 1, V, LANES, VEC)


@triton.jit
def load_normalized(p_row, p_grad, weight, b_rstd, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """(x rstd, d out weight)"""
    b_y = load_terms(p_row, i_tile, V, LANES, VEC) * b_rstd
    return b_y, weighted(load_terms(p_grad, i_tile, V, LANES, VEC), weight, i_tile, V, LANES, VEC)


@unspecialized(aligned=["weight"])
def rms_norm_bwd_kernel(
    x,
    grad,
    weight,
    rstd,
    out,
    L,
    V,
    stride_b,
    stride_l,
    grad_stride_b,
    grad_stride_l,
    out_stride_b,
    out_stride_l,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """d x = rstd (g - y mean(g y)), with y = x rstd and g = d out weight."""
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    p_row = row_pointer(x, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    p_grad = row_pointer(grad, row_offset(i_t, L, grad_stride_b, grad_stride_l, ALIGN), ALIGN)
    p_out = row_pointer(out, row_offset(i_t, L, out_stride_b, out_stride_l, ALIGN), ALIGN)
    b_rstd = tl.load(rstd + i_t)
    b_dot = tl.zeros([LANES], tl.float32)
    i_last = tl.cdiv(V, LANES * VEC) - 1
    if not ONE_TILE:
        for i in range(i_last):
            b_y, b_g = load_normalized(p_row, p_grad, weight, b_rstd, i_last - i, V, LANES, VEC)
            b_dot += tl.sum(b_g * b_y, 1)
    b_y, b_g = load_normalized(p_row, p_grad, weight, b_rstd, 0, V, LANES, VEC)
    b_dot += tl.sum(b_g * b_y, 1)
    mean = tl.sum(b_dot, 0) / V
    store_tile(p_out, b_rstd * (b_g - b_y * mean), 0, V, LANES, VEC)
    if not ONE_TILE:
        for i in range(i_last):
            b_y, b_g = load_normalized(p_row, p_grad, weight, b_rstd, i + 1, V, LANES, VEC)
            store_tile(p_out, b_rstd * (b_g - b_y * mean), i + 1, V, LANES, VEC)


@triton.jit
def load_rows(p_x, p_grad, p_rstd, i_l, L, steps, i_row, rows, ROWS: tl.constexpr):
    """(tuple of (x, d out, rstd) at ROWS rows from row i_row on, p_x, p_grad and i_l of the row after them).

    i_l: the place of the row among the L rows of its batch entry. The values are 0 from row `rows` on.
    steps: of x and then of d out: the stride of L, and the step from the last row of a batch entry to the next entry.
    """
    step, last_step, grad_step, last_grad_step = steps
    loaded = ()
    for j in tl.static_range(ROWS):
        m_row = i_row + j < rows
        b_x, b_grad = tl.load(p_x, mask=m_row, other=0.0), tl.load(p_grad, mask=m_row, other=0.0)
        loaded += ((b_x, b_grad, tl.load(p_rstd + j, mask=m_row, other=0.0)),)
        i_l += 1
        p_x += tl.where(i_l == L, last_step, step)
        p_grad += tl.where(i_l == L, last_grad_step, grad_step)
        i_l = tl.where(i_l == L, 0, i_l)
    return loaded, p_x, p_grad, i_l


@triton.jit(
    do_not_specialize=["outer", "block", "L", "R", "V", "stride_b", "stride_l", "grad_stride_b", "grad_stride_l"]
)
def rms_norm_weight_kernel(
    x,
    grad,
    rstd,
    partials,
    outer,
    block,
    L,
    R,
    V,
    stride_b,
    stride_l,
    grad_stride_b,
    grad_stride_l,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each lane adds d out * y over a block of rows of its columns. Rows of the output: the blocks."""
    i_block, o_c, m_block = column_tile(outer, V, LANES, VEC)
    stride_b, stride_l = multiple(stride_b.to(tl.int64), VEC), multiple(stride_l.to(tl.int64), VEC)
    grad_stride_b, grad_stride_l = multiple(grad_stride_b.to(tl.int64), VEC), multiple(grad_stride_l.to(tl.int64), VEC)
    i_row = i_block.to(R.dtype) * block
    rows = tl.where(m_block, tl.minimum(R - i_row, block), 0)
    p_rstd = rstd + i_row
    p_x = x + row_offset(i_row, L, stride_b, stride_l, VEC) + o_c
    p_grad = grad + row_offset(i_row, L, grad_stride_b, grad_stride_l, VEC) + o_c
    i_l = i_row % L
    steps = (stride_l, stride_b - (L - 1) * stride_l, grad_stride_l, grad_stride_b - (L - 1) * grad_stride_l)
    b_sum = tl.zeros([LANES, VEC], tl.float32)
    loaded, p_x, p_grad, i_l = load_rows(p_x, p_grad, p_rstd, i_l, L, steps, 0, rows, ROWS)
    for i in range(ROWS, tl.minimum(R, block) + ROWS, ROWS):
        p_rstd += ROWS
        # read one tile ahead: the compiler otherwise moves each load to its sum, where the thread waits for it
        following, p_x, p_grad, i_l = load_rows(p_x, p_grad, p_rstd, i_l, L, steps, i, rows, ROWS)
        for j in tl.static_range(ROWS):
            b_x, b_grad, b_rstd = loaded[j]
            b_sum = tl.fma(b_grad.to(tl.float32), b_x.to(tl.float32) * b_rstd, b_sum)
        loaded = following
    tl.store(partials + i_block.to(tl.int64) * multiple(V, VEC) + o_c, b_sum, mask=m_block)


def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (out, rstd): x * rstd * weight, and 1 / sqrt(mean(x^2) + eps) as [..., 1] float32."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        rows, out_rows = matrices_of(x, out)
        rows = aligned(rows, forward_config(x.shape[-1], x.dtype).vec)
        _forward(rows, aligned_vector(weight), out_rows, rstd, eps=eps)
    return out, rstd


@prepared
def _forward(x: Tensor, weight: Tensor | None, out: Tensor, rstd: Tensor, *, eps: float) -> Launch:
    config = forward_config(x.shape[-1], x.dtype)
    return over_rows(
        rms_norm_fwd_kernel,
        (rstd.numel(),),
        eps,
        *sizes_of(x, out),
        ONE_TILE=x.shape[-1] <= config.tile,
        config=config,
        rows=(x, out),
    )


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (d x, d weight as [H]), each empty unless `input_grad` or `weight_grad`.

    d weight has the dtype of weight, and float32 without a weight.
    """
    out = x.new_empty(x.shape if input_grad else (0,))
    out_weight = (rstd if weight is None else weight).new_empty(x.shape[-1:] if weight_grad else (0,))
    if not x.numel():
        return out, out_weight.zero_()
    x, grad = matrices_of(x, grad)
    if input_grad:
        vec = backward_config(x.shape[-1], x.dtype).vec
        _input_grad(aligned(x, vec), aligned(grad, vec), aligned_vector(weight), rstd, out.view(x.shape))
    if weight_grad:
        block = rows_per_block(rstd.numel())
        partials = weight_partials(x, grad, rstd, block)
        reduce_column_blocks(partials[None, None], out_weight, block=block, divisor=1)
    return out, out_weight


@prepared
def _input_grad(x: Tensor, grad: Tensor, weight: Tensor | None, rstd: Tensor, out: Tensor) -> Launch:
    """Writes d x into `out`. x, grad and out are [L, H] or [B, L, H]."""
    config = backward_config(x.shape[-1], x.dtype)
    return over_rows(
        rms_norm_bwd_kernel,
        (rstd.numel(),),
        *sizes_of(x, grad, out),
        ONE_TILE=x.shape[-1] <= config.tile,
        config=config,
        rows=(x, grad, out),
    )


def weight_partials(x: Tensor, grad: Tensor, rstd: Tensor, block: int) -> Tensor:
    """The sums of d out y over each `block` rows, [blocks, H] float32. x, grad: [L, H] or [B, L, H]."""
    partials = rstd.new_empty(cdiv(rstd.numel(), block), x.shape[-1])
    _weight_partials(x, grad, rstd, partials, block=block)
    return partials


@prepared
def _weight_partials(x: Tensor, grad: Tensor, rstd: Tensor, partials: Tensor, *, block: int) -> Launch:
    blocks, size = partials.shape
    length, _, *strides = sizes_of(x, grad)
    values = blocks, block, length, rstd.numel(), size, *strides
    return over_columns(rms_norm_weight_kernel, blocks, *values, size=size, strides=strides, inputs=(x, grad))


def forward_config(size: int, dtype: torch.dtype) -> LaunchConfig:
    """A hidden state of up to 8,192 elements is one tile. A thread has fewer elements if each takes an address."""
    return make_config(size, dtype, threads=512, per_thread=16 if is_whole(size, dtype) else 8)


def backward_config(size: int, dtype: torch.dtype) -> LaunchConfig:
    """As in the forward, with twice as many values in registers."""
    return make_config(size, dtype, threads=512, per_thread=8 if is_whole(size, dtype) else 4)
