"""GPU backend of matmul: one program sums an output, in the order of common/triton/products.py.

The order of a sum does not depend on M, N, strides or the tile.
Names: as in common/triton/row_tiles.py; D is the reduced dimension, G the number of groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton import architecture
from ...common.triton.config import TileConfig
from ...common.triton.launch import Launch, prepared
from ...common.triton.numbers import round_to
from ...common.triton.products import (
    SAME_BITS_IN_ALL_TILES,
    add_products,
    sum_of_blocks,
    tile_of_program,
)
from ...common.triton.row_tiles import multiple
from ...common.triton.sizes import cdiv, next_power_of_2

# not specialised, so that there is one binary per dtype, layout and ALIGN
SIZES = ["M", "N", "D", "G", "tiles_m", "stride_ab", "stride_a", "stride_bb", "stride_b", "stride_cb", "stride_c"]
SIZES += ["stride_ob", "stride_o"]


@triton.jit
def group_of_block(ends, i_block, M, G, G_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group's rows) of a block of rows; no rows if first row >= end.

    The blocks of group g start at block begin // BLOCK_M + g. A group has as many blocks as its rows fill, or one
    more, so that its blocks do not depend on the rows before them. Group G has the rows after the last group.
    """
    o_g = tl.arange(0, G_BLOCK)
    b_begins = tl.load(ends + o_g - 1, mask=(o_g > 0) & (o_g <= G), other=0)
    i_g = tl.sum(((o_g <= G) & (b_begins // BLOCK_M + o_g <= i_block)).to(tl.int32)) - 1
    begin = tl.maximum(tl.load(ends + i_g - 1, mask=i_g > 0, other=0), 0).to(tl.int64)
    end = tl.load(ends + i_g, mask=i_g < G, other=M).to(tl.int64)
    first = begin + (i_block - (begin // BLOCK_M + i_g)) * BLOCK_M
    return i_g.to(tl.int64), tl.maximum(first, 0), tl.minimum(end, M)


@triton.jit(do_not_specialize=SIZES)
def matmul_kernel(
    a,
    b,
    addend,
    out,
    ends,
    alpha,
    beta,
    M,
    N,
    D,
    G,
    tiles_m,
    stride_ab,
    stride_a,
    stride_bb,
    stride_b,
    stride_cb,
    stride_c,
    stride_ob,
    stride_o,
    GROUPED: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    G_BLOCK: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """out = alpha a b + beta addend; the addend may be None.

    A_TURNED, B_TURNED: whether the columns of a or b are contiguous, rather than the rows.
    GROUPED: "rows" or "terms" in groups that end at `ends`, or "" without groups.
    """
    M = M if not A_TURNED else multiple(M, ALIGN)
    N = multiple(N, ALIGN)
    D = D if A_TURNED and not B_TURNED else multiple(D, ALIGN)
    stride_a = multiple(stride_a, ALIGN)
    stride_b = multiple(stride_b, ALIGN)
    i_b, i_m, i_n = tile_of_program(tiles_m, tl.cdiv(N, BLOCK_N), BAND)
    first_m = (i_m * BLOCK_M).to(tl.int64)
    end_m = M.to(tl.int64)
    begin_d = tl.zeros([], tl.int64)
    end_d = D.to(tl.int64)
    if GROUPED == "rows":
        i_b, first_m, end_m = group_of_block(ends, i_m, M, G, G_BLOCK, BLOCK_M)
        if first_m >= end_m:
            return
        end_d = tl.where(i_b < G, end_d, 0)
    if GROUPED == "terms":
        begin_d = tl.maximum(tl.load(ends + i_b - 1, mask=i_b > 0, other=0).to(tl.int64), 0)
        end_d = tl.minimum(tl.load(ends + i_b).to(tl.int64), end_d)
    o_m = first_m + tl.arange(0, BLOCK_M)[:, None]
    m_m = o_m < end_m
    first_n = (i_n * BLOCK_N).to(tl.int64)
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < N - first_n
    o_d = tl.arange(0, BLOCK_D)
    step_a = stride_a.to(tl.int64) if A_TURNED else 1
    step_b = 1 if B_TURNED else stride_b.to(tl.int64)
    p_a = a + i_b * multiple(stride_ab, ALIGN) + begin_d * step_a + (o_m if A_TURNED else o_m * stride_a)
    p_b = b + i_b * multiple(stride_bb, ALIGN) + begin_d * step_b
    p_b += (first_n + o_n) * stride_b if B_TURNED else first_n + o_n
    p_a += o_d[None, :] * step_a
    p_b += o_d[:, None] * step_b
    terms = (end_d - begin_d).to(tl.int32)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_d in range(tl.cdiv(terms, BLOCK_D)):
        m_d = o_d < terms - i_d * BLOCK_D
        b_a = tl.load(p_a, mask=m_m & m_d[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_d[:, None] & m_n, other=0.0)
        b_block, b_sum = add_products(b_a, b_b, b_block, b_sum, i_d)
        p_a += BLOCK_D * step_a
        p_b += BLOCK_D * step_b
    b_sum = sum_of_blocks(b_block, b_sum, a.dtype.element_ty) * alpha
    if addend is not None:
        p_c = addend + i_b * multiple(stride_cb, ALIGN) + o_m * multiple(stride_c, ALIGN) + first_n + o_n
        b_c = tl.load(p_c, mask=m_m & m_n, other=0.0).to(tl.float32)
        # the compiler could fuse either product with the sum, and another one for another tile
        b_sum = tl.fma(b_c, beta, b_sum)
    o_b = 0 if GROUPED == "rows" else i_b * multiple(stride_ob, ALIGN)
    p_out = out + o_b + o_m * multiple(stride_o, ALIGN) + first_n + o_n
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=m_m & m_n)


def matmul_into(
    out: Tensor, a: Tensor, b: Tensor, *, addend: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """out = alpha (a @ b) + beta addend. Arguments as in common/native_matmul.py."""
    # + 0.0 makes 0.0 of -0.0, because both are one key of a launch
    _launch(_readable(a), _readable(b), addend, out, None, alpha=alpha + 0.0, beta=beta, grouped="")
    return out


def grouped_into(out: Tensor, a: Tensor, b: Tensor, ends: Tensor, grouped: str) -> None:
    """Write one matrix product per group into out. Arguments as in cpu.py.

    `ends` out of order or range raises no error, because the host does not wait for the device. The kernel reads and
    writes no memory outside the tensors in that case.
    """
    if grouped == "columns":
        turned = out.new_empty(out.shape[::-1])
        grouped_into(turned, b.mT, a.mT, ends, "rows")
        out.copy_(turned.T)
    else:
        _launch(_readable(a), _readable(b), None, out, ends, alpha=1.0, beta=1.0, grouped=grouped)


@prepared
def _launch(
    a: Tensor,
    b: Tensor,
    addend: Tensor | None,
    out: Tensor,
    ends: Tensor | None,
    *,
    alpha: float,
    beta: float,
    grouped: str,
) -> Launch:
    """grouped: as in matmul_kernel. a and b are readable."""
    stride_ab, a_row, a_column = _matrix_strides(a)
    stride_bb, b_row, b_column = _matrix_strides(b)
    batch = out.shape[0] if out.dim() == 3 else 1
    rows, columns, depth = out.shape[-2], out.shape[-1], a.shape[-1]
    groups = len(ends) if ends is not None else 0
    a_turned, b_turned = a_column != 1, b_row == 1 and b_column != 1
    *_, stride_cb, stride_c, _ = (0, 0, 0, *(addend.stride() if addend is not None else ()))
    strides = (
        stride_ab,
        a_column if a_turned else a_row,
        stride_bb,
        b_column if b_turned else b_row,
        stride_cb,
        stride_c,
        out.stride(0) if out.dim() == 3 else 0,
        out.stride(-2),
    )
    sizes = (rows if a_turned else depth, depth if b_turned else columns, columns, *strides)
    vec = 16 // a.element_size()
    # 128-bit accesses need every size and stride to be a multiple of 128 bits, and every address
    is_wide = all(n % vec == 0 for n in sizes) and all(x is None or x.data_ptr() % 16 == 0 for x in (a, b, addend, out))
    count, mean_rows = (groups, rows // groups) if grouped == "rows" else (batch, rows)
    gpu = architecture.of(out.device)
    config = tile_config(Products(gpu, a.dtype, count, mean_rows, columns, a_turned, is_wide))
    # with groups of rows: an upper bound, known without waiting for the device
    tiles_m = rows // config.rows + groups + 1 if grouped == "rows" else cdiv(rows, config.rows)
    constants = {
        "GROUPED": grouped,
        "A_TURNED": a_turned,
        "B_TURNED": b_turned,
        "G_BLOCK": next_power_of_2(groups + 1),
        "BAND": 8,
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "BLOCK_D": config.depth,
        "ALIGN": vec if is_wide else 1,
        "num_warps": config.num_warps,
        "num_stages": config.stages,
    }
    values = alpha, beta, rows, columns, depth, groups, tiles_m, *strides
    return Launch(matmul_kernel, (batch * tiles_m * cdiv(columns, config.columns),), values, constants)


def _readable(x: Tensor) -> Tensor:
    """x, or its copy if neither its rows nor its columns are contiguous.

    A dimension of one element may have any stride, and so may every dimension of an empty tensor.
    """
    if 1 in x.stride()[-2:] or 1 in x.shape[-2:] or not x.numel():
        return x
    return x.contiguous()


def _matrix_strides(x: Tensor) -> tuple[int, int, int]:
    """(stride of the batch, of a row, of a column) of a readable x; one of the last two is 1."""
    *outer, row, column = x.stride()
    if x.shape[-1] == 1:
        column = 1
    elif column != 1:
        row = 1
    return outer[0] if outer else 0, row, column


class Products(NamedTuple):
    """The properties of a launch that choose its tile."""

    gpu: str  # as architecture.of names it
    dtype: torch.dtype  # of the operands
    count: int  # products, or groups
    rows: int  # of one product, or the mean of the groups of rows
    columns: int
    a_turned: bool
    is_wide: bool  # accesses have 128 bits; otherwise each element takes an address, and registers


# the fewest columns for which one row still gives 64 programs of the wider tile
WIDE = 8192
# for GPUs of SAME_BITS_IN_ALL_TILES
TILE_OF_16_ROWS = TileConfig(rows=16, columns=32, depth=256, threads=128, stages=4)
TILE_OF_64_ROWS = TileConfig(rows=64, columns=64, depth=128, threads=128, stages=4)
LARGE_TILES = (
    TileConfig(rows=256, columns=128, depth=64, threads=256, stages=3),
    TileConfig(rows=128, columns=128, depth=64, threads=256, stages=3),
)
MEASURED_TILES = (TILE_OF_16_ROWS, TILE_OF_64_ROWS, *LARGE_TILES)
# a large tile must give work to most of the 132 multiprocessors of an H200
ENOUGH_PROGRAMS = 96


def tile_config(products: Products) -> TileConfig:
    """The tile of a launch. The number of rows chooses it only where each output has the same bits in all tiles.

    Float32: on NVIDIA GPUs one thread sums an output, in the order of add_products, whatever the tile.
    16-bit: tensor cores add some terms at once, in an order of their own. So the GPU must be one that was measured.
    The depth of a step changes no sum: an instruction adds a fixed number of terms, in ascending order over all steps.
    """
    if products.dtype == torch.float32:
        if products.rows > 32 and products.is_wide and products.gpu.startswith("sm_"):
            # a thread has 16 outputs: 8 multiply-adds for each access to shared memory; with 8 outputs there are 4
            return TileConfig(rows=64, columns=64, depth=16, threads=256, stages=3)
        return TileConfig(rows=32, columns=64, depth=16, threads=256, stages=3)
    if products.gpu in SAME_BITS_IN_ALL_TILES and products.is_wide:
        return _tile_by_rows(products)
    # for few columns the tile is narrow, so that one row still has enough programs
    columns = 128 if products.columns >= WIDE else 64
    # AMD GPUs have 64 KiB of shared memory, a third of NVIDIA's
    stages = 2 if products.gpu.startswith("gfx") else 4
    return TileConfig(rows=64, columns=columns, depth=32, threads=256, stages=stages)


def _tile_by_rows(products: Products) -> TileConfig:
    # columns of 16 elements would leave too few registers
    if products.rows <= 16 and not products.a_turned:
        return TILE_OF_16_ROWS
    if products.rows > 128:
        for tile in LARGE_TILES:
            down, across = cdiv(products.rows, tile.rows), cdiv(products.columns, tile.columns)
            if products.count * down * across >= ENOUGH_PROGRAMS:
                return tile
    return TILE_OF_64_ROWS
