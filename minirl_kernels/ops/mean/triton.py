"""GPU backend of mean and sum: a program sums one block of a row, or of some neighbouring columns.

The reduced dimension is cut into blocks of a fixed size. Their sums are reduced in the same way, until one is left. So
one long row gives work to many programs, and the order of summation is a function of the length alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.launch import LaunchConfig, aligned, is_whole, launch, make_config
from ...common.triton.numbers import round_to
from ...common.triton.row_tiles import load_terms, multiple, row_offset, row_pointer, unspecialized
from .layout import layout_of, reduced_dims, reduced_shape

# elements of a row per program: a whole number of tiles; the row of a vocabulary takes about ten programs
BLOCK = 16_384
COLUMN_SIZES = ["L", "R", "V", "blocks", "stride_b", "stride_l", "stride_r"]


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
def column_offsets(V, COLUMNS: tl.constexpr):
    """(index of the output row, column offsets [1, COLUMNS], their mask) of a program of a one-dimensional grid."""
    tiles = tl.cdiv(V, COLUMNS)
    i_program = tl.program_id(0).to(tl.int64)
    o_c = (i_program % tiles * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return i_program // tiles, o_c, o_c < V


@triton.jit(do_not_specialize=COLUMN_SIZES)
def mean_columns_kernel(
    x,
    out,
    divisor,
    blocks,
    L,
    R,
    V,
    stride_b,
    stride_l,
    stride_r,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    V = V // ALIGN * ALIGN
    i_out, o_c, m_c = column_offsets(V, COLUMNS)
    start = i_out % blocks * BLOCK
    p_matrix = x + row_offset(i_out // blocks, L, stride_b, stride_l, ALIGN)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tl.cdiv(tl.minimum(R - start, BLOCK), ROWS)):
        o_r = (start + i * ROWS + tl.arange(0, ROWS))[:, None]
        b_x = tl.load(p_matrix + o_r * multiple(stride_r, ALIGN) + o_c, mask=(o_r < R) & m_c, other=0.0)
        b_sum += b_x.to(tl.float32)
    b_total = tl.div_rn(tl.sum(b_sum, 0)[None, :], divisor)
    tl.store(out + i_out * V + o_c, round_to(b_total, out.dtype.element_ty), mask=m_c)


def forward(
    x: Tensor, dim: int | tuple[int, ...] | None, keepdim: bool, dtype: torch.dtype | None, divide: bool
) -> Tensor:
    """The mean of x over `dim` if `divide`, else the sum. dtype: of the result; None means the dtype of x."""
    if dtype not in (None, x.dtype, torch.float32):
        return forward(x, dim, keepdim, torch.float32, divide).to(dtype)
    dtype = dtype or x.dtype
    dims = reduced_dims(x, dim)
    out = torch.empty(reduced_shape(x, dims, keepdim), dtype=dtype, device=x.device)
    if out.numel():
        layout = layout_of(x, dims, transposes=False)
        sizes = (layout.batch, layout.length, layout.reduced, layout.inner)
        x = layout.x.as_strided(sizes, (layout.batch_stride, layout.length_stride, layout.reduced_stride, 1))
        # the two functions give different bits, so the choice must not depend on sizes
        reduce = reduce_rows if layout.trailing else reduce_columns
        reduce(x, out, layout.reduced if divide else 1)
    return out


def reduce_rows(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sums of x [B, L, R, 1] over R, divided by `divisor`, into `out` of B L elements."""
    x = x.squeeze(3)
    while x.shape[2] > BLOCK:
        partials = x.new_empty((1, x.shape[0] * x.shape[1], triton.cdiv(x.shape[2], BLOCK)), dtype=torch.float32)
        reduce_row_blocks(x, partials, 1)
        x = partials
    reduce_row_blocks(x, out, divisor)


def reduce_row_blocks(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sum of each block of R of x [B, L, R], divided by `divisor`, into `out`."""
    batch, length, reduced = x.shape
    config = rows_config(reduced, x.dtype)
    x = aligned(x, config)
    launch(
        mean_rows_kernel,
        (out.numel(),),
        x,
        out,
        float(divisor),
        out.numel() // (batch * length),
        length,
        reduced,
        x.stride(0),
        x.stride(1),
        BLOCK=BLOCK,
        config=config,
        rows=(x,),
    )


def reduce_columns(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sums of x [B, L, R, I] over R, divided by `divisor`, into `out` of B L I elements."""
    block = columns_config().block
    while x.shape[2] > block:
        sizes = (1, x.shape[0] * x.shape[1], triton.cdiv(x.shape[2], block), x.shape[3])
        partials = x.new_empty(sizes, dtype=torch.float32)
        reduce_column_blocks(x, partials, 1)
        x = partials
    reduce_column_blocks(x, out, divisor)


def reduce_column_blocks(x: Tensor, out: Tensor, divisor: int) -> None:
    """Write the sum of each block of R of x [B, L, R, I], divided by `divisor`, into `out`."""
    batch, length, reduced, inner = x.shape
    strides = x.stride()[:3]
    outer = out.numel() // inner
    launch_columns(
        mean_columns_kernel,
        outer,
        x,
        out,
        float(divisor),
        outer // (batch * length),
        length,
        reduced,
        inner,
        *strides,
        size=inner,
        strides=strides,
        dtype=x.dtype,
    )


def launch_columns(kernel, outer: int, *args, size: int, strides: tuple[int, ...], dtype: torch.dtype) -> None:
    """Run `kernel` over `outer` times `size` columns of tensors of `dtype`; args[0] is one of these tensors."""
    config = columns_config()
    vec = 16 // dtype.itemsize
    aligned = all(n % vec == 0 for n in (size, *strides))
    with torch.cuda.device_of(args[0]):
        kernel[(outer * triton.cdiv(size, config.columns),)](
            *args,
            ROWS=config.rows,
            COLUMNS=config.columns,
            BLOCK=config.block,
            ALIGN=vec if aligned else 1,
            num_warps=config.num_warps,
        )


@dataclass(frozen=True)
class ColumnConfig:
    """The block sizes of a sum of columns. They are constant, so that a column does not depend on the other columns.

    rows, columns: of the tile that a program loads at once.
    block: number of rows that a program sums.
    threads: of a program.
    """

    rows: int
    columns: int
    block: int
    threads: int

    @property
    def tile(self) -> int:
        return self.rows * self.columns

    @property
    def num_warps(self) -> int:
        return self.threads // (64 if torch.version.hip else 32)


def rows_config(reduced: int, dtype: torch.dtype) -> LaunchConfig:
    """A block is one tile, so that all of its loads are in flight at once. An access of one element takes more
    registers, so an odd row has smaller tiles."""
    per_thread = 32 if is_whole(reduced, dtype) else 16 // dtype.itemsize
    return make_config(min(reduced, BLOCK), dtype, threads=512, per_thread=per_thread)


def columns_config() -> ColumnConfig:
    """64 columns are 128 bytes or more of each row. Blocks are short, because many tokens come with few columns."""
    return ColumnConfig(rows=32, columns=64, block=1024, threads=128)
