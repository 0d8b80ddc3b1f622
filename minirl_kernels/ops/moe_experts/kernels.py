"""Triton kernels of moe_experts, and their launches.

A pair is a token and one of its experts. Pair t * K + k has the k-th expert of token t. A row is the place of a pair
after a sort of the pairs by expert. Pairs with an expert id out of range come last, as rows of expert E.

All rows of a program have the same expert, so that NaN in the weights of one expert reaches only its own tokens. The
combine kernel reads results by pair: the results of a token are neighbours, in the order of its routing. All other
results are stored by row.

Names: as in common/triton/row_tiles.py; D is the reduced dimension of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.alignment import aligned
from ...common.triton.config import TileConfig
from ...common.triton.launch import Launch, prepared
from ...common.triton.numbers import LOG2E, round_to
from ...common.triton.products import add_products, sum_of_blocks, tile_of_program
from ...common.triton.row_tiles import multiple
from ...common.triton.sizes import cdiv, next_power_of_2
from .kernels_tiles import are_whole, tiles

# not specialised, so that there is one binary per dtype, K, E_BLOCK and ALIGN
SIZES = ["E", "H", "I", "M", "N", "D", "stride_t", "stride_e", "stride_o", "stride_left", "stride_right"]
# a slice of the weights may begin at any element
UNALIGNED = ["weights"]


@triton.jit
def rows_of_block(begins, i_block, E, E_BLOCK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a block of rows; no rows if first row >= end.

    The blocks of expert e are numbered from begins[e] // BLOCK_M + e, which leaves enough numbers for every expert. So
    an expert has as many blocks as its rows fill, or one more without rows. Its first block begins at its first row, so
    that the rows of other experts do not change which rows share a block.
    """
    o_e = tl.arange(0, E_BLOCK)
    b_begins = tl.load(begins + o_e, mask=o_e <= E, other=0)
    i_e = tl.sum(((o_e <= E) & (b_begins // BLOCK_M + o_e <= i_block)).to(tl.int32)) - 1
    begin = tl.load(begins + i_e)
    first = begin + (i_block - (begin // BLOCK_M + i_e)) * BLOCK_M
    return i_e.to(tl.int64), first, tl.load(begins + i_e + 1)


@triton.jit
def block_of_program(columns, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """(block of rows, tile of columns) of this program. Neighbouring blocks of rows have mostly one expert."""
    tiles_n = tl.cdiv(columns, BLOCK_N)
    _, i_block, i_n = tile_of_program(tl.num_programs(0) // tiles_n, tiles_n, BAND)
    return i_block, i_n


@triton.jit
def rows_by_columns(
    p_x, m_m, p_w, m_n, stride_d, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_M, BLOCK_N] float32: the products of rows at p_x [BLOCK_M, 1] and columns at p_w [1, BLOCK_N].

    stride_d: distance of two neighbouring elements of a column.
    """
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_d in range(tl.cdiv(D, BLOCK_D)):
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + o_d[None, :], mask=m_m & (o_d < D)[None, :], other=0.0)
        b_w = tl.load(p_w + o_d[:, None].to(tl.int64) * stride_d, mask=(o_d < D)[:, None] & m_n, other=0.0)
        b_block, b_sum = add_products(b_x, b_w, b_block, b_sum, i_d)
    return sum_of_blocks(b_block, b_sum, p_x.dtype.element_ty)


@triton.jit
def sigmoids(b_x):
    """(sigmoid(x), sigmoid(-x)), computed from e^-|x| without cancellation; a result too small for a float is 0."""
    b_e = tl.exp2(-tl.abs(b_x) * LOG2E)
    b_large = 1.0 / (1.0 + b_e)
    b_small = b_e * b_large
    return tl.where(b_x < 0, b_small, b_large), tl.where(b_x < 0, b_large, b_small)


@triton.jit(do_not_specialize=SIZES)
def experts_up_kernel(
    hidden,
    gate_up_proj,
    pairs,
    begins,
    activation,
    gate_up,
    E,
    H,
    I,
    stride_t,
    stride_e,
    stride_o,
    K: tl.constexpr,
    E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """activation = silu(gate) * up. gate_up gets gate and up side by side; it may be None.

    Rows with an expert id out of range are not written.
    """
    I = multiple(I, ALIGN)
    i_block, i_n = block_of_program(I, BLOCK_N, BAND)
    i_e, first, end = rows_of_block(begins, i_block, E, E_BLOCK, BLOCK_M)
    if (first >= end) | (i_e == E):
        return
    H = multiple(H, ALIGN)
    stride_o = multiple(stride_o, ALIGN)
    o_m = first + tl.arange(0, BLOCK_M)[:, None]
    m_m = o_m < end
    first_n = i_n * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < I - first_n
    b_tokens = tl.load(pairs + o_m, mask=m_m, other=0) // K
    p_x = hidden + b_tokens * multiple(stride_t, ALIGN)
    p_w = gate_up_proj + i_e * multiple(stride_e, ALIGN)
    p_gate = p_w + (first_n + o_n).to(tl.int64) * stride_o
    p_up = p_w + (I + first_n + o_n).to(tl.int64) * stride_o
    b_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_gate_block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_up_block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_d in range(tl.cdiv(H, BLOCK_D)):
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        m_w = (o_d < H)[:, None] & m_n
        b_x = tl.load(p_x + o_d[None, :], mask=m_m & (o_d < H)[None, :], other=0.0)
        b_w = tl.load(p_gate + o_d[:, None], mask=m_w, other=0.0)
        b_gate_block, b_gate = add_products(b_x, b_w, b_gate_block, b_gate, i_d)
        b_w = tl.load(p_up + o_d[:, None], mask=m_w, other=0.0)
        b_up_block, b_up = add_products(b_x, b_w, b_up_block, b_up, i_d)
    b_gate = sum_of_blocks(b_gate_block, b_gate, hidden.dtype.element_ty)
    b_up = sum_of_blocks(b_up_block, b_up, hidden.dtype.element_ty)
    b_sigmoid, _ = sigmoids(b_gate)
    dtype: tl.constexpr = activation.dtype.element_ty
    tl.store(activation + first_n + o_m * I + o_n, round_to(b_gate * b_sigmoid * b_up, dtype), mask=m_m & m_n)
    if gate_up is not None:
        p_kept = gate_up + first_n + o_m * (2 * I) + o_n
        tl.store(p_kept, round_to(b_gate, dtype), mask=m_m & m_n)
        tl.store(p_kept + I, round_to(b_up, dtype), mask=m_m & m_n)


@triton.jit(do_not_specialize=SIZES)
def experts_product_kernel(
    x,
    matrix,
    pairs,
    begins,
    y,
    E,
    D,
    N,
    stride_e,
    stride_o,
    TRANSPOSED: tl.constexpr,
    E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y[pair] = matrix[expert] x[row], with a matrix [N, D]. If TRANSPOSED, the matrix is [D, N] and is transposed.

    y is NaN for an expert id out of range.
    """
    N = multiple(N, ALIGN)
    i_block, i_n = block_of_program(N, BLOCK_N, BAND)
    i_e, first, end = rows_of_block(begins, i_block, E, E_BLOCK, BLOCK_M)
    if first >= end:
        return
    D = multiple(D, ALIGN)
    stride_o = multiple(stride_o, ALIGN)
    o_m = first + tl.arange(0, BLOCK_M)[:, None]
    m_m = o_m < end
    first_n = i_n * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < N - first_n
    b_y = tl.full([BLOCK_M, BLOCK_N], float("nan"), tl.float32)
    if i_e < E:
        p_x = x + o_m * D
        p_w = matrix + i_e * multiple(stride_e, ALIGN)
        if TRANSPOSED:
            b_y = rows_by_columns(p_x, m_m, p_w + first_n + o_n, m_n, stride_o, D, BLOCK_M, BLOCK_N, BLOCK_D)
        else:
            p_w += (first_n + o_n).to(tl.int64) * stride_o
            b_y = rows_by_columns(p_x, m_m, p_w, m_n, 1, D, BLOCK_M, BLOCK_N, BLOCK_D)
    b_pairs = tl.load(pairs + o_m, mask=m_m, other=0).to(tl.int32)
    tl.store(y + first_n + b_pairs.to(tl.int64) * N + o_n, b_y, mask=m_m & m_n)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def experts_activation_grad_kernel(
    grad_out,
    down_proj,
    gate_up,
    weights,
    pairs,
    begins,
    gate_up_grad,
    weighted,
    parts,
    E,
    H,
    I,
    stride_e,
    stride_o,
    K: tl.constexpr,
    E_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """With S = grad_out[token] down_proj[expert], writes three results, each of which may be None:

    gate_up_grad: the gradients of gate and up, from weight * S.
    weighted: weight * activation, for d down_proj.
    parts: the sum of activation * S over this block of I, for each pair; their sum is d weight.
    """
    I = multiple(I, ALIGN)
    i_block, i_n = block_of_program(I, BLOCK_N, BAND)
    i_e, first, end = rows_of_block(begins, i_block, E, E_BLOCK, BLOCK_M)
    if first >= end:
        return
    H = multiple(H, ALIGN)
    o_m = first + tl.arange(0, BLOCK_M)[:, None]
    m_m = o_m < end
    b_pairs = tl.load(pairs + o_m, mask=m_m, other=0).to(tl.int32)
    if i_e == E:
        if parts is not None:
            o_parts = b_pairs.to(tl.int64) * tl.cdiv(I, BLOCK_N) + i_n
            tl.store(parts + o_parts, tl.full([BLOCK_M, 1], float("nan"), tl.float32), mask=m_m)
        return
    first_n = i_n * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < I - first_n
    if gate_up_grad is not None or parts is not None:
        p_x = grad_out + (b_pairs // K).to(tl.int64) * H
        p_w = down_proj + i_e * multiple(stride_e, ALIGN) + first_n + o_n
        b_s = rows_by_columns(p_x, m_m, p_w, m_n, multiple(stride_o, ALIGN), H, BLOCK_M, BLOCK_N, BLOCK_D)
    o_row = first_n + o_m * (2 * I)
    b_weight = tl.load(weights + b_pairs, mask=m_m, other=0.0).to(tl.float32)
    b_gate = tl.load(gate_up + o_row + o_n, mask=m_m & m_n, other=0.0).to(tl.float32)
    b_up = tl.load(gate_up + I + o_row + o_n, mask=m_m & m_n, other=0.0).to(tl.float32)
    b_sigmoid, b_rest = sigmoids(b_gate)
    b_silu = b_gate * b_sigmoid
    dtype: tl.constexpr = gate_up.dtype.element_ty
    if weighted is not None:
        tl.store(weighted + first_n + o_m * I + o_n, round_to(b_silu * b_up * b_weight, dtype), mask=m_m & m_n)
    if parts is not None:
        o_parts = b_pairs.to(tl.int64) * tl.cdiv(I, BLOCK_N) + i_n
        tl.store(parts + o_parts, tl.sum(b_silu * b_up * b_s, 1)[:, None], mask=m_m)
    if gate_up_grad is not None:
        b_s *= b_weight
        b_slope = b_sigmoid * tl.fma(b_gate, b_rest, 1.0)
        tl.store(gate_up_grad + o_row + o_n, round_to(b_s * b_up * b_slope, dtype), mask=m_m & m_n)
        tl.store(gate_up_grad + I + o_row + o_n, round_to(b_s * b_silu, dtype), mask=m_m & m_n)


@triton.jit(do_not_specialize=SIZES)
def experts_weight_grad_kernel(
    left,
    right,
    pairs,
    begins,
    out,
    M,
    N,
    stride_left,
    stride_right,
    K: tl.constexpr,
    LEFT_BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """out[expert] = the sum of left^T right over the rows of the expert, in their order; 0 for an expert without rows.

    One of left and right is indexed by token, the other by row.
    """
    M = multiple(M, ALIGN)
    N = multiple(N, ALIGN)
    i_e, i_m, i_n = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), BAND)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first_n = i_n * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)[None, :]
    m_n = o_n < N - first_n
    begin = tl.load(begins + i_e)
    end = tl.load(begins + i_e + 1)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_block = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    terms = (end - begin).to(tl.int32)
    for i_d in range(tl.cdiv(terms, BLOCK_D)):
        o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = o_d < terms
        b_tokens = tl.load(pairs + begin + o_d, mask=m_d, other=0) // K
        o_left = (b_tokens if LEFT_BY_TOKEN else begin + o_d)[None, :] * multiple(stride_left, ALIGN)
        o_right = (begin + o_d if LEFT_BY_TOKEN else b_tokens)[:, None] * multiple(stride_right, ALIGN)
        b_left = tl.load(left + o_left + o_m, mask=m_d[None, :] & (o_m < M), other=0.0)
        b_right = tl.load(right + first_n + o_right + o_n, mask=m_d[:, None] & m_n, other=0.0)
        b_block, b_sum = add_products(b_left, b_right, b_block, b_sum, i_d)
    b_sum = sum_of_blocks(b_block, b_sum, left.dtype.element_ty)
    p_out = out + first_n + (i_e * M + o_m) * N + o_n
    tl.store(p_out, round_to(b_sum, out.dtype.element_ty), mask=(o_m < M) & m_n)


class Rows(NamedTuple):
    """The rows of a call: the pair of each row, and the rows of each expert."""

    pairs: Tensor  # [T K] int64: the pair of each row, token * K + k; ascending within an expert
    begins: Tensor  # [E + 2] int64: first row of each expert, first row with an id out of range, number of rows
    top_k: int

    @property
    def num_experts(self) -> int:
        return self.begins.shape[0] - 2

    @property
    def mean(self) -> int:
        """Rows of an expert on average, rounded down."""
        return len(self.pairs) // max(self.num_experts, 1)

    def blocks(self, config: TileConfig) -> int:
        """An upper bound of the number of blocks of rows_of_block. The host does not wait for the device."""
        pairs = self.pairs.shape[0]
        return pairs // config.rows + self.num_experts + 1 if pairs else 0


def up(hidden: Tensor, gate_up_proj: Tensor, rows: Rows, activation: Tensor, gate_up: Tensor | None) -> None:
    """Writes activation [T K, I] and gate_up [T K, 2 I], both by row."""
    hidden, gate_up_proj = _laid_out((hidden.shape[1], activation.shape[1]), hidden, gate_up_proj)
    _up(hidden, gate_up_proj, rows.pairs, rows.begins, activation, gate_up, top_k=rows.top_k)


@prepared
def _up(
    hidden: Tensor,
    gate_up_proj: Tensor,
    pairs: Tensor,
    begins: Tensor,
    activation: Tensor,
    gate_up: Tensor | None,
    *,
    top_k: int,
) -> Launch:
    rows, sizes = Rows(pairs, begins, top_k), (hidden.shape[1], activation.shape[1])
    return _over_rows(
        experts_up_kernel,
        rows,
        sizes,
        (hidden.stride(0), *gate_up_proj.stride()[:2]),
        tiles(hidden, sizes, rows.mean).up,
        hidden.dtype,
        K=top_k,
    )


def product(x: Tensor, matrix: Tensor, rows: Rows, y: Tensor, *, transposed: bool) -> None:
    """Writes y [T, K, N] float32. x [T K, D] is by row; matrix is [E, N, D], or [E, D, N] if transposed."""
    (matrix,) = _laid_out((x.shape[1], y.shape[-1]), matrix)
    _product(x, matrix, rows.pairs, rows.begins, y, transposed=transposed)


@prepared
def _product(x: Tensor, matrix: Tensor, pairs: Tensor, begins: Tensor, y: Tensor, *, transposed: bool) -> Launch:
    rows, sizes = Rows(pairs, begins, y.shape[1]), (x.shape[1], y.shape[-1])
    return _over_rows(
        experts_product_kernel,
        rows,
        sizes,
        matrix.stride()[:2],
        tiles(x, sizes, rows.mean).product,
        x.dtype,
        TRANSPOSED=transposed,
    )


def activation_grad(
    grad_out: Tensor,
    down_proj: Tensor,
    gate_up: Tensor,
    weights: Tensor,
    rows: Rows,
    gate_up_grad: Tensor | None,
    weighted: Tensor | None,
    parts: Tensor | None,
) -> None:
    """Writes gate_up_grad [T K, 2 I] and weighted [T K, I] by row, and parts [T, K, weight_parts] float32.

    grad_out must be contiguous.
    """
    grad_out, down_proj = _laid_out(down_proj.shape[1:], grad_out, down_proj)
    _activation_grad(grad_out, down_proj, gate_up, weights, rows.pairs, rows.begins, gate_up_grad, weighted, parts)


@prepared
def _activation_grad(
    grad_out: Tensor,
    down_proj: Tensor,
    gate_up: Tensor,
    weights: Tensor,
    pairs: Tensor,
    begins: Tensor,
    *_: Tensor | None,
) -> Launch:
    rows, sizes = Rows(pairs, begins, weights.shape[1]), down_proj.shape[1:]
    return _over_rows(
        experts_activation_grad_kernel,
        rows,
        sizes,
        down_proj.stride()[:2],
        tiles(gate_up, sizes, rows.mean).activation_grad,
        gate_up.dtype,
        K=rows.top_k,
    )


def weight_grad(left: Tensor, right: Tensor, rows: Rows, out: Tensor, *, left_by_token: bool) -> None:
    """Writes out [E, M, N]. left_by_token: left [T, M] and right [T K, N]; else left [T K, M] and right [T, N]."""
    left, right = _laid_out(out.shape[1:], left, right)
    _weight_grad(left, right, rows.pairs, rows.begins, out, top_k=rows.top_k, left_by_token=left_by_token)


@prepared
def _weight_grad(
    left: Tensor, right: Tensor, pairs: Tensor, begins: Tensor, out: Tensor, *, top_k: int, left_by_token: bool
) -> Launch:
    num_experts, *sizes = out.shape
    of_shape = tiles(out, sizes, Rows(pairs, begins, top_k).mean)
    config = of_shape.down_grad if left_by_token else of_shape.gate_up_grad
    programs = num_experts * cdiv(sizes[0], config.rows) * cdiv(sizes[1], config.columns)
    values = (*sizes, left.stride(0), right.stride(0))
    constants = _tile(config, sizes, out.dtype)
    return Launch(
        experts_weight_grad_kernel, (programs,), values, {"K": top_k, "LEFT_BY_TOKEN": left_by_token, **constants}
    )


def _laid_out(sizes: Sequence[int], *operands: Tensor) -> tuple[Tensor, ...]:
    """The operands, each aligned if its rows can be."""
    if not are_whole(sizes, operands[0].dtype):
        return operands
    return tuple(aligned(x, 16 // x.element_size()) for x in operands)


def _over_rows(
    kernel,
    rows: Rows,
    sizes: Sequence[int],
    strides: tuple[int, ...],
    config: TileConfig,
    dtype: torch.dtype,
    **constants,
) -> Launch:
    """The launch of a kernel over blocks of rows and tiles of columns.

    sizes, strides: of the contiguous dimensions, columns last, and of the others.
    dtype: of the operands.
    """
    programs = rows.blocks(config) * cdiv(sizes[1], config.columns)
    values = (rows.num_experts, *sizes, *strides)
    e_block = next_power_of_2(rows.num_experts + 1)
    return Launch(kernel, (programs,), values, {**constants, "E_BLOCK": e_block, **_tile(config, sizes, dtype)})


def _tile(config: TileConfig, sizes: Sequence[int], dtype: torch.dtype) -> dict[str, int]:
    """The constants of a kernel with products, and the options of Triton."""
    return {
        "BLOCK_M": config.rows,
        "BLOCK_N": config.columns,
        "BLOCK_D": config.depth,
        "BAND": 8,
        "ALIGN": 16 // dtype.itemsize if are_whole(sizes, dtype) else 1,
        "num_warps": config.num_warps,
        "num_stages": config.stages,
    }
