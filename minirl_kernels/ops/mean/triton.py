"""GPU backend of mean and sum: a program sums one block of a row, or of some neighbouring columns.

The reduced dimension is cut into blocks of a fixed size. Their sums are reduced in the same way, until one is left. So
one long row gives work to many programs, and the order of summation is a function of the length alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.alignment import aligned
from ...common.triton.columns import column_tile, over_columns, rows_per_block
from ...common.triton.config import LaunchConfig, is_whole, make_config, sizes_of
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.numbers import round_to
from ...common.triton.row_tiles import load_terms, multiple, row_offset, row_pointer, unspecialized
from ...common.triton.sizes import cdiv
from .layout import layout_of, reduced

# elements of a row per program: a whole number of tiles; the row of a vocabulary takes about ten programs
BLOCK = 16_384
COLUMN_SIZES = ["outer", "blocks", "block", "L", "R", "V", "stride_b", "stride_l", "stride_r"]


@unspecialized()
def mean_rows_kernel(
    x,
    out,
    divisor,
    blocks,
    L,
    V,
    stride_b,
    stride_l,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    p_row = row_pointer(x, row_offset(i_out // blocks, L, stride_b, stride_l, ALIGN), ALIGN)
    b_sum = tl.zeros([LANES, VEC], tl.float32)
    tiles: tl.constexpr = BLOCK // (LANES * VEC)
    # in 32 bits, because the compiler merges an offset of 64 bits with that of the row, and forgets its alignment
    i_first = (i_out % blocks).to(tl.int32) * tiles
    for i in range(tl.minimum(tl.cdiv(V, LANES * VEC) - i_first, tiles)):
        b_sum += load_terms(p_row, i_first + i, V, LANES, VEC)
    total = tl.sum(tl.sum(b_sum, 1), 0)
    tl.store(out + i_out, round_to(tl.div_rn(total, divisor), out.dtype.element_ty))


@triton.jit
def load_rows(p_x, stride, i_row, rows, ROWS: tl.constexpr):
    """A tuple of the values at ROWS rows from row i_row on, 0 from row `rows` on. p_x points at row i_row."""
    loaded = ()
    for j in tl.static_range(ROWS):
        loaded += (tl.load(p_x + j * stride, mask=i_row + j < rows, other=0.0),)
    return loaded


@triton.jit(do_not_specialize=COLUMN_SIZES)
def mean_columns_kernel(
    x,
    out,
    divisor,
    outer,
    blocks,
    block,
    L,
    R,
    V,
    stride_b,
    stride_l,
    stride_r,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Each lane adds a block of rows of its columns. Rows of the output: B L blocks."""
    i_out, o_c, m_out = column_tile(outer, V, LANES, VEC)
    stride_r = multiple(stride_r.to(tl.int64), VEC)
    i_first = (i_out % blocks).to(R.dtype) * block
    rows = tl.where(m_out, tl.minimum(R - i_first, block), 0)
    p_x = x + row_offset(i_out // blocks, L, stride_b.to(tl.int64), stride_l.to(tl.int64), VEC)
    p_x += i_first * stride_r + o_c
    b_sum = tl.zeros([LANES, VEC], tl.float32)
    loaded = load_rows(p_x, stride_r, 0, rows, ROWS)
    for i in range(ROWS, tl.minimum(R, block) + ROWS, ROWS):
        p_x += ROWS * stride_r
        # read one tile ahead: the compiler otherwise moves each load to its sum, where the thread waits for it
        following = load_rows(p_x, stride_r, i, rows, ROWS)
        for j in tl.static_range(ROWS):
            b_sum += loaded[j].to(tl.float32)
        loaded = following
    b_sum = round_to(tl.div_rn(b_sum, divisor), out.dtype.element_ty)
    tl.store(out + i_out.to(tl.int64) * multiple(V, VEC) + o_c, b_sum, mask=m_out)


def forward(
    x: Tensor, dim: int | tuple[int, ...] | None, keepdim: bool, dtype: torch.dtype | None, divide: bool
) -> Tensor:
    """The mean of x over `dim` if `divide`, else the sum. dtype: of the result; None means the dtype of x."""
    dims, shape = reduced(x, dim, keepdim)
    out = x.new_empty(shape, dtype=dtype)
    if out.numel():
        layout = layout_of(x, dims, transposes=False)
        sizes = (layout.batch, layout.length, layout.reduced)
        strides = (layout.batch_stride, layout.length_stride, layout.reduced_stride)
        divisor = layout.reduced if divide else 1
        # the two functions give different bits, so the choice must not depend on sizes
        if layout.trailing:
            reduce_rows(layout.x.as_strided(sizes, strides), out, divisor)
        else:
            reduce_columns(layout.x.as_strided((*sizes, layout.inner), (*strides, 1)), out, divisor)
    return out


def reduce_rows(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sums of x [B, L, R] over R, divided by `divisor`, into `out` of B L elements."""
    while x.shape[2] > BLOCK:
        partials = x.new_empty((1, x.shape[0] * x.shape[1], cdiv(x.shape[2], BLOCK)), dtype=torch.float32)
        reduce_row_blocks(x, partials, 1)
        x = partials
    reduce_row_blocks(x, out, divisor)


def reduce_row_blocks(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sum of each block of R of x [B, L, R], divided by `divisor`, into `out`."""
    _row_blocks(aligned(x, rows_config(x.shape[2], x.dtype).vec), out, divisor=divisor)


@prepared
def _row_blocks(x: Tensor, out: Tensor, *, divisor: int) -> Launch:
    blocks = out.numel() // x.shape[:2].numel()
    config = rows_config(x.shape[2], x.dtype)
    values = float(divisor), blocks, *sizes_of(x)
    return over_rows(mean_rows_kernel, (out.numel(),), *values, BLOCK=BLOCK, config=config, rows=(x,))


def reduce_columns(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sums of x [B, L, R, I] over R, divided by `divisor`, into `out` of B L I elements."""
    block = rows_per_block(x.shape[2])
    if x.shape[2] > block:
        sizes = (1, x.shape[0] * x.shape[1], cdiv(x.shape[2], block), x.shape[3])
        partials = x.new_empty(sizes, dtype=torch.float32)
        reduce_column_blocks(x, partials, block=block, divisor=1)
        x = partials
    reduce_column_blocks(x, out, block=block, divisor=divisor)


@prepared
def reduce_column_blocks(x: Tensor, out: Tensor, *, block: int, divisor: int) -> Launch:
    """Write the sum of each `block` rows of R of x [B, L, R, I], divided by `divisor`, into `out`."""
    batch, length, reduced, inner = x.shape
    strides = x.stride()[:3]
    outer = out.numel() // inner
    return over_columns(
        mean_columns_kernel,
        outer,
        float(divisor),
        outer,
        outer // (batch * length),
        block,
        length,
        reduced,
        inner,
        *strides,
        size=inner,
        strides=strides,
        inputs=(x,),
    )


def rows_config(reduced: int, dtype: torch.dtype) -> LaunchConfig:
    """A block is one tile, so that all of its loads are in flight at once. An access of one element takes more
    registers, so an odd row has smaller tiles."""
    per_thread = 32 if is_whole(reduced, dtype) else 16 // dtype.itemsize
    return make_config(min(reduced, BLOCK), dtype, threads=512, per_thread=per_thread)
