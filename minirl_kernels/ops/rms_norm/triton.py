"""GPU backend of rms_norm: one program per row; for d weight, one per block of rows and columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.rows import matrices_of
from ...common.triton.launch import LaunchConfig, aligned, aligned_vector, is_whole, launch, make_config, row_strides
from ...common.triton.row_tiles import load_terms, row_offset, row_pointer, store_tile, unspecialized
from ..mean import triton as mean
from ..mean.triton import column_offsets


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


@triton.jit(do_not_specialize=["L", "R", "V", "stride_b", "stride_l", "grad_stride_b", "grad_stride_l"])
def rms_norm_weight_kernel(
    x,
    grad,
    rstd,
    partials,
    L,
    R,
    V,
    stride_b,
    stride_l,
    grad_stride_b,
    grad_stride_l,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes the sums of d out * y over a block of rows."""
    V = V // ALIGN * ALIGN
    i_block, o_c, m_c = column_offsets(V, COLUMNS)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tl.cdiv(tl.minimum(R - i_block * BLOCK, BLOCK), ROWS)):
        o_r = i_block * BLOCK + i * ROWS + tl.arange(0, ROWS)
        m_r = o_r < R
        mask = m_r[:, None] & m_c
        b_rstd = tl.load(rstd + o_r, mask=m_r, other=0.0)
        o_x = row_offset(o_r, L, stride_b, stride_l, ALIGN)[:, None] + o_c
        o_g = row_offset(o_r, L, grad_stride_b, grad_stride_l, ALIGN)[:, None] + o_c
        b_y = tl.load(x + o_x, mask=mask, other=0.0).to(tl.float32) * b_rstd[:, None]
        b_sum += tl.load(grad + o_g, mask=mask, other=0.0).to(tl.float32) * b_y
    tl.store(partials + i_block * V + o_c, tl.sum(b_sum, 0)[None, :], mask=m_c)


def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (out, rstd): x * rstd * weight, and 1 / sqrt(mean(x^2) + eps) as [..., 1] float32."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if x.numel():
        size = x.shape[-1]
        rows, out_rows = matrices_of(x, out)
        config = forward_config(size, x.dtype)
        rows = aligned(rows, config)
        length, *strides = row_strides(rows)
        launch(
            rms_norm_fwd_kernel,
            (rstd.numel(),),
            rows,
            aligned_vector(weight),
            out_rows,
            rstd,
            eps,
            length,
            size,
            *strides,
            *row_strides(out_rows)[1:],
            ONE_TILE=size <= config.tile,
            config=config,
            rows=(rows, out_rows),
        )
    return out, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (d x, d weight as [H] float32), each empty unless `input_grad` or `weight_grad`."""
    out = x.new_empty(x.shape if input_grad else (0,))
    out_weight = x.new_zeros(x.shape[-1:] if weight_grad else (0,), dtype=torch.float32)
    if x.numel():
        x, grad = matrices_of(x, grad)
        if input_grad:
            _input_grad(x, grad, weight, rstd, out.view(x.shape))
        if weight_grad:
            out_weight = mean.forward(weight_partials(x, grad, rstd), 0, False, None, False)
    return out, out_weight


def _input_grad(x: Tensor, grad: Tensor, weight: Tensor | None, rstd: Tensor, out: Tensor) -> None:
    """Writes d x into `out`. x, grad and out are [L, H] or [B, L, H]."""
    size = x.shape[-1]
    config = backward_config(size, x.dtype)
    x, grad = aligned(x, config), aligned(grad, config)
    length, *strides = row_strides(x)
    launch(
        rms_norm_bwd_kernel,
        (rstd.numel(),),
        x,
        grad,
        aligned_vector(weight),
        rstd,
        out,
        length,
        size,
        *strides,
        *row_strides(grad)[1:],
        *row_strides(out)[1:],
        ONE_TILE=size <= config.tile,
        config=config,
        rows=(x, grad, out),
    )


def weight_partials(x: Tensor, grad: Tensor, rstd: Tensor) -> Tensor:
    """The parts of d weight, [blocks of rows, H] float32; their sum is d weight. x, grad: [L, H] or [B, L, H]."""
    size = x.shape[-1]
    partials = rstd.new_empty(triton.cdiv(rstd.numel(), mean.columns_config().block), size)
    length, *strides = row_strides(x)
    strides += row_strides(grad)[1:]
    mean.launch_columns(
        rms_norm_weight_kernel,
        len(partials),
        x,
        grad,
        rstd,
        partials,
        length,
        rstd.numel(),
        size,
        *strides,
        size=size,
        strides=strides,
        dtype=x.dtype,
    )
    return partials


def forward_config(size: int, dtype: torch.dtype) -> LaunchConfig:
    """A hidden state of up to 8,192 elements is one tile. A thread has fewer elements if each takes an address."""
    return make_config(size, dtype, threads=512, per_thread=16 if is_whole(size, dtype) else 8)


def backward_config(size: int, dtype: torch.dtype) -> LaunchConfig:
    """As in the forward, with twice as many values in registers."""
    return make_config(size, dtype, threads=512, per_thread=8 if is_whole(size, dtype) else 4)
