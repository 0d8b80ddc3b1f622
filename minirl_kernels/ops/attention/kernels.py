"""attention on the GPU: programs over blocks of stacked rows (a query in one of the heads that share a head of keys),
or over blocks of keys for the gradients by k and v.

The blocks of a span are cut from its own first row and its own first key, whatever spans come before it.

Names: as in common/triton/row_tiles.py; M rows and N keys of a block; D of q and k, DV of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.numbers import LOG2E, LOWEST, dot, exponent, round_to
from ...common.triton.row_tiles import multiple

# one binary per dtype, D, DV, group and alignment: ALIGN says all that a kernel needs to know of these
STRIDES = [f"stride_{name}{axis}" for name in "qkv" for axis in "bhl"]
SIZES = ["num_spans", "queries_of_batch", "keys_of_batch", *STRIDES]


@triton.jit
def block_of(block_spans, begins, num_spans):
    """(span, number of this program's block in it) by axis 0; the span is num_spans where the program has none."""
    i_span = tl.load(block_spans + tl.program_id(0))
    begin = tl.load(begins + i_span, mask=i_span < num_spans, other=0)
    return i_span, tl.program_id(0) - begin


@triton.jit
def span_at(spans, i_span):
    """(batch entry, first query, queries, first key, keys)"""
    p_span = spans + i_span * 5
    return tl.load(p_span), tl.load(p_span + 1), tl.load(p_span + 2), tl.load(p_span + 3), tl.load(p_span + 4)


@triton.jit
def rows_in(batch, first, o_r, head, GROUP: tl.constexpr, stride_b, stride_h, stride_l):
    """Elements to each stacked row of the span whose queries begin with `first`: query o_r // GROUP of head o_r % GROUP
    of those that share one."""
    return batch * stride_b + (first + o_r // GROUP) * stride_l + (head * GROUP + o_r % GROUP) * stride_h


@triton.jit
def seen_by(o_r, queries, keys, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """How many keys each row sees."""
    b_seen = keys - queries + o_r // GROUP + 1 if CAUSAL else keys + 0 * o_r
    return tl.maximum(b_seen, 0)


@triton.jit
def load_rows(p_rows, m_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)[None, :]
    return tl.load(p_rows + o_d, mask=m_rows & (o_d < SIZE), other=0.0)


@triton.jit
def load_unless_split(p_rows, m_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """What row_products needs loaded: nothing where it loads parts by itself."""
    return 0.0 if DEPTH < BLOCK else load_rows(p_rows, m_rows, SIZE, BLOCK)


@triton.jit
def row_products(
    b_a,
    b_b,
    p_a,
    p_b,
    m_a,
    m_b,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[A_ROWS, B_ROWS]: rows at p_a and m_a [A_ROWS, 1] by rows at p_b and m_b [B_ROWS, 1]; DEPTH terms at once."""
    b_sum = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    if DEPTH < BLOCK:
        for i_d in range(tl.cdiv(SIZE, DEPTH)):
            o_d = i_d * DEPTH + tl.arange(0, DEPTH)[None, :]
            b_left = tl.load(p_a + o_d, mask=m_a & (o_d < SIZE), other=0.0)
            b_right = tl.load(p_b + o_d, mask=m_b & (o_d < SIZE), other=0.0)
            b_sum = dot(b_left, tl.trans(b_right), b_sum)
    else:
        b_sum = dot(b_a, tl.trans(b_b), b_sum)
    return b_sum


@triton.jit(do_not_specialize=SIZES)
def attention_fwd_kernel(
    q,
    k,
    v,
    spans,
    block_spans,
    begins,
    out,
    stats,
    c,
    num_spans,
    queries_of_batch,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """out [B, Lq, Hq, DV] and stats [B, Lq, Hq, 2], the shift and the sum of each row, which may be None. c: scale of
    the scores, for exp2."""
    i_span, i_block = block_of(block_spans, begins, num_spans)
    if i_span >= num_spans:
        return
    head = tl.program_id(1).to(tl.int64)
    batch, first_query, queries, first_key, keys = span_at(spans, i_span)
    o_r = i_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_r = o_r < queries * GROUP
    strides_q = (multiple(stride_qb, ALIGN), multiple(stride_qh, ALIGN), multiple(stride_ql, ALIGN))
    p_q = q + rows_in(batch, first_query, o_r, head, GROUP, strides_q[0], strides_q[1], strides_q[2])
    b_q = load_unless_split(p_q, m_r, D, BLOCK_D, DEPTH)
    b_seen = tl.where(m_r, seen_by(o_r, queries, keys, GROUP, CAUSAL), 0)
    seen = tl.max(tl.max(b_seen, 0), 0)
    stride_kl = multiple(stride_kl, ALIGN)
    stride_vl = multiple(stride_vl, ALIGN)
    p_keys = k + batch * multiple(stride_kb, ALIGN) + head * multiple(stride_kh, ALIGN) + first_key * stride_kl
    p_values = v + batch * multiple(stride_vb, ALIGN) + head * multiple(stride_vh, ALIGN) + first_key * stride_vl
    o_n = tl.arange(0, BLOCK_N)
    b_shift = tl.full([BLOCK_M, 1], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M, 1], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i_n in range(tl.cdiv(seen, BLOCK_N)):
        o_key = i_n * BLOCK_N + o_n
        m_n = (o_key < seen)[:, None]
        p_k = p_keys + o_key[:, None] * stride_kl
        b_k = load_unless_split(p_k, m_n, D, BLOCK_D, DEPTH)
        b_s = row_products(b_q, b_k, p_q, p_k, m_r, m_n, BLOCK_M, BLOCK_N, D, BLOCK_D, DEPTH)
        b_s = tl.where(o_key[None, :] < b_seen, b_s, -float("inf"))
        b_max = tl.maximum(b_shift, tl.max(b_s, 1)[:, None])
        b_e = tl.exp2(exponent(b_s - b_max, c))
        b_keep = tl.exp2(exponent(b_shift - b_max, c))
        b_sum = b_sum * b_keep + tl.sum(b_e, 1)[:, None]
        b_v = load_rows(p_values + o_key[:, None] * stride_vl, m_n, DV, BLOCK_DV)
        b_out = dot(round_to(b_e, v.dtype.element_ty), b_v, b_out * b_keep)
        b_shift = b_max
    o_v = tl.arange(0, BLOCK_DV)[None, :]
    # a row that sees no key has 0 / 1
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)
    heads = tl.num_programs(1) * GROUP
    o_row = rows_in(batch, first_query, o_r, head, GROUP, queries_of_batch * heads, 1, heads)
    tl.store(out + o_row * DV + o_v, round_to(b_out, out.dtype.element_ty), mask=m_r & (o_v < DV))
    if stats is not None:
        tl.store(stats + 2 * o_row, b_shift, mask=m_r)
        tl.store(stats + 2 * o_row + 1, b_sum, mask=m_r)


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_q_kernel(
    q,
    k,
    v,
    spans,
    block_spans,
    begins,
    out,
    stats,
    grad_out,
    deltas,
    grad_q,
    c,
    scale,
    num_spans,
    queries_of_batch,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """grad_q [B, Lq, Hq, D], which may be None, and deltas [B, Lq, Hq], the sum of out * grad_out over each row."""
    i_span, i_block = block_of(block_spans, begins, num_spans)
    if i_span >= num_spans:
        return
    head = tl.program_id(1).to(tl.int64)
    batch, first_query, queries, first_key, keys = span_at(spans, i_span)
    o_r = i_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_r = o_r < queries * GROUP
    heads = tl.num_programs(1) * GROUP
    o_row = rows_in(batch, first_query, o_r, head, GROUP, queries_of_batch * heads, 1, heads)
    p_do = grad_out + o_row * DV
    b_do = load_rows(p_do, m_r, DV, BLOCK_DV)
    b_out = load_rows(out + o_row * DV, m_r, DV, BLOCK_DV)
    b_delta = tl.sum(b_out.to(tl.float32) * b_do.to(tl.float32), 1)[:, None]
    tl.store(deltas + o_row, b_delta, mask=m_r)
    if grad_q is not None:
        strides_q = (multiple(stride_qb, ALIGN), multiple(stride_qh, ALIGN), multiple(stride_ql, ALIGN))
        p_q = q + rows_in(batch, first_query, o_r, head, GROUP, strides_q[0], strides_q[1], strides_q[2])
        b_q = load_unless_split(p_q, m_r, D, BLOCK_D, DEPTH)
        b_seen = tl.where(m_r, seen_by(o_r, queries, keys, GROUP, CAUSAL), 0)
        seen = tl.max(tl.max(b_seen, 0), 0)
        b_shift = tl.load(stats + 2 * o_row, mask=m_r, other=0.0)
        b_sum = tl.load(stats + 2 * o_row + 1, mask=m_r, other=1.0)
        b_scale = 1.0 / tl.where(b_sum == 0, 1.0, b_sum)
        stride_kl = multiple(stride_kl, ALIGN)
        stride_vl = multiple(stride_vl, ALIGN)
        p_keys = k + batch * multiple(stride_kb, ALIGN) + head * multiple(stride_kh, ALIGN) + first_key * stride_kl
        p_values = v + batch * multiple(stride_vb, ALIGN) + head * multiple(stride_vh, ALIGN) + first_key * stride_vl
        o_n = tl.arange(0, BLOCK_N)
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i_n in range(tl.cdiv(seen, BLOCK_N)):
            o_key = i_n * BLOCK_N + o_n
            m_n = (o_key < seen)[:, None]
            p_k = p_keys + o_key[:, None] * stride_kl
            p_v = p_values + o_key[:, None] * stride_vl
            b_k = load_rows(p_k, m_n, D, BLOCK_D)
            b_v = load_unless_split(p_v, m_n, DV, BLOCK_DV, DEPTH)
            b_s = row_products(b_q, b_k, p_q, p_k, m_r, m_n, BLOCK_M, BLOCK_N, D, BLOCK_D, DEPTH)
            b_s = tl.where(o_key[None, :] < b_seen, b_s, -float("inf"))
            b_p = tl.exp2(exponent(b_s - b_shift, c)) * b_scale
            b_dp = row_products(b_do, b_v, p_do, p_v, m_r, m_n, BLOCK_M, BLOCK_N, DV, BLOCK_DV, DEPTH)
            b_dq = dot(round_to(b_p * (b_dp - b_delta), k.dtype.element_ty), b_k, b_dq)
        o_d = tl.arange(0, BLOCK_D)[None, :]
        tl.store(grad_q + o_row * D + o_d, round_to(b_dq * scale, grad_q.dtype.element_ty), mask=m_r & (o_d < D))


@triton.jit(do_not_specialize=SIZES)
def attention_bwd_kv_kernel(
    q,
    k,
    v,
    spans,
    block_spans,
    begins,
    stats,
    grad_out,
    deltas,
    grad_k,
    grad_v,
    c,
    scale,
    num_spans,
    queries_of_batch,
    keys_of_batch,
    stride_qb,
    stride_qh,
    stride_ql,
    stride_kb,
    stride_kh,
    stride_kl,
    stride_vb,
    stride_vh,
    stride_vl,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """grad_k [B, Lk, Hkv, D] and grad_v [B, Lk, Hkv, DV], each of which may be None: sums over the rows of the span, in
    blocks from its first."""
    i_span, i_block = block_of(block_spans, begins, num_spans)
    if i_span >= num_spans:
        return
    head = tl.program_id(1).to(tl.int64)
    batch, first_query, queries, first_key, keys = span_at(spans, i_span)
    o_key = i_block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m_n = o_key < keys
    p_k = k + batch * multiple(stride_kb, ALIGN) + head * multiple(stride_kh, ALIGN)
    p_k += (first_key + o_key) * multiple(stride_kl, ALIGN)
    p_v = v + batch * multiple(stride_vb, ALIGN) + head * multiple(stride_vh, ALIGN)
    p_v += (first_key + o_key) * multiple(stride_vl, ALIGN)
    b_k = load_unless_split(p_k, m_n, D, BLOCK_D, DEPTH)
    b_v = load_unless_split(p_v, m_n, DV, BLOCK_DV, DEPTH)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    heads = tl.num_programs(1) * GROUP
    rows = queries * GROUP
    # where it is causal, the queries before see none of these keys
    first_block = tl.maximum(i_block * BLOCK_N - (keys - queries), 0) * GROUP // BLOCK_M if CAUSAL else 0 * rows
    for i_m in range(first_block, tl.cdiv(rows, BLOCK_M)):
        o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_r = (o_r < rows)[:, None]
        strides_q = (multiple(stride_qb, ALIGN), multiple(stride_qh, ALIGN), multiple(stride_ql, ALIGN))
        p_q = q + rows_in(batch, first_query, o_r, head, GROUP, strides_q[0], strides_q[1], strides_q[2])[:, None]
        o_row = rows_in(batch, first_query, o_r, head, GROUP, queries_of_batch * heads, 1, heads)
        p_do = grad_out + o_row[:, None] * DV
        b_q = load_rows(p_q, m_r, D, BLOCK_D)
        b_do = load_rows(p_do, m_r, DV, BLOCK_DV)
        b_shift = tl.load(stats + 2 * o_row, mask=o_r < rows, other=0.0)
        b_sum = tl.load(stats + 2 * o_row + 1, mask=o_r < rows, other=1.0)
        b_delta = tl.load(deltas + o_row, mask=o_r < rows, other=0.0)
        b_seen = tl.where(o_r < rows, seen_by(o_r, queries, keys, GROUP, CAUSAL), 0)
        b_s = row_products(b_k, b_q, p_k, p_q, m_n, m_r, BLOCK_N, BLOCK_M, D, BLOCK_D, DEPTH)
        b_s = tl.where(o_key < b_seen[None, :], b_s, -float("inf"))
        b_p = tl.exp2(exponent(b_s - b_shift[None, :], c)) * (1.0 / tl.where(b_sum == 0, 1.0, b_sum))[None, :]
        if grad_v is not None:
            b_dv = dot(round_to(b_p, v.dtype.element_ty), b_do, b_dv)
        if grad_k is not None:
            b_dp = row_products(b_v, b_do, p_v, p_do, m_n, m_r, BLOCK_N, BLOCK_M, DV, BLOCK_DV, DEPTH)
            b_dk = dot(round_to(b_p * (b_dp - b_delta[None, :]), q.dtype.element_ty), b_q, b_dk)
    o_row = (batch * keys_of_batch + first_key + o_key) * tl.num_programs(1) + head
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_v = tl.arange(0, BLOCK_DV)[None, :]
    if grad_k is not None:
        tl.store(grad_k + o_row * D + o_d, round_to(b_dk * scale, grad_k.dtype.element_ty), mask=m_n & (o_d < D))
    if grad_v is not None:
        tl.store(grad_v + o_row * DV + o_v, round_to(b_dv, grad_v.dtype.element_ty), mask=m_n & (o_v < DV))


def attend(q, k, v, spans, causal: bool, scale: float, out: Tensor, stats: Tensor | None) -> None:
    """Writes out [B, Lq, Hq, Dv], and stats [B, Lq, Hq, 2] float32, where the spans are; both are contiguous."""
    config = attention_config(max(q.shape[3], v.shape[3]), q.dtype)
    blocks = query_blocks(q, k, spans, config)
    tensors = (q, k, v, spans, *blocks.tables, out, stats)
    _launch(attention_fwd_kernel, blocks, tensors, (scale * LOG2E.value,), (q.shape[2],), (q, k, v), causal, config)


def backward_q(q, k, v, spans, out, stats, grad_out, causal, scale, grad_q: Tensor | None) -> Tensor:
    """Writes grad_q, and returns the deltas [B, Lq, Hq] that backward_kv takes."""
    deltas = stats.new_empty(stats.shape[:3])
    config = backward_q_config(max(q.shape[3], v.shape[3]), q.dtype)
    blocks = query_blocks(q, k, spans, config)
    tensors = (q, k, v, spans, *blocks.tables, out, stats, grad_out, deltas, grad_q)
    floats = (scale * LOG2E.value, scale)
    _launch(attention_bwd_q_kernel, blocks, tensors, floats, (q.shape[2],), (q, k, v), causal, config)
    return deltas


def backward_kv(
    q, k, v, spans, stats, grad_out, deltas, causal, scale, grad_k: Tensor | None, grad_v: Tensor | None
) -> None:
    config = backward_kv_config(max(q.shape[3], v.shape[3]), q.dtype)
    blocks = key_blocks(k, spans, config)
    tensors = (q, k, v, spans, *blocks.tables, stats, grad_out, deltas, grad_k, grad_v)
    floats, sizes = (scale * LOG2E.value, scale), (q.shape[2], k.shape[2])
    _launch(attention_bwd_kv_kernel, blocks, tensors, floats, sizes, (q, k, v), causal, config)


class Blocks(NamedTuple):
    """Of the rows or the keys of all spans, each cut from its own first."""

    block_spans: Tensor  # [at least as many as there are] int64: the span of each, N where there is none
    begins: Tensor  # [N] int64: the first of each span

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.block_spans, self.begins


def query_blocks(q: Tensor, k: Tensor, spans: Tensor, config: TileConfig) -> Blocks:
    group = q.shape[1] // k.shape[1]
    return _blocks(spans[:, 2] * group, q.shape[0] * q.shape[2] * group, config.rows)


def key_blocks(k: Tensor, spans: Tensor, config: TileConfig) -> Blocks:
    return _blocks(spans[:, 4], k.shape[0] * k.shape[2], config.keys)


def _blocks(counts: Tensor, most: int, size: int) -> Blocks:
    """most: no less than the sum of the counts, known without asking the device."""
    blocks = (counts + size - 1) // size
    ends = blocks.cumsum(0)
    places = torch.arange(most // size + len(counts) if most else 0, device=counts.device)
    return Blocks(torch.searchsorted(ends, places, right=True), ends - blocks)


def _launch(
    kernel,
    blocks: Blocks,
    tensors: tuple,
    floats: tuple[float, ...],
    sizes: tuple[int, ...],
    operands: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    config: TileConfig,
) -> None:
    q, k, v = operands
    grid = (len(blocks.block_spans), k.shape[1])
    if 0 in grid:
        return
    strides = [stride for x in operands for stride in x.stride()[:3]]
    vec = 16 // q.element_size()
    with torch.cuda.device_of(q):
        kernel[grid](
            *tensors,
            *floats,
            len(blocks.begins),
            *sizes,
            *strides,
            CAUSAL=causal,
            GROUP=q.shape[1] // k.shape[1],
            D=q.shape[3],
            DV=v.shape[3],
            BLOCK_M=config.rows,
            BLOCK_N=config.keys,
            BLOCK_D=max(triton.next_power_of_2(q.shape[3]), 16),
            BLOCK_DV=max(triton.next_power_of_2(v.shape[3]), 16),
            DEPTH=config.depth,
            # accesses can be 128 bits where all of them are multiples of that
            ALIGN=vec if all(n % vec == 0 for n in (*strides, q.shape[3], v.shape[3])) else 1,
            num_warps=config.num_warps,
            num_stages=config.stages,
        )


@dataclass(frozen=True)
class TileConfig:
    """How a span is cut, from the sizes of a head and the dtype alone, so that a row's bits do not depend on others.

    rows x keys: of a tile of scores; depth: terms of a score that are summed at once; stages: blocks in flight.
    """

    rows: int
    keys: int
    depth: int
    threads: int
    stages: int

    @property
    def tile(self) -> int:
        return self.rows * self.keys

    @property
    def num_warps(self) -> int:
        return self.threads // (64 if torch.version.hip else 32)


def attention_config(size: int, dtype: torch.dtype) -> TileConfig:
    """64 rows: the fewest that tensor cores multiply at once on sm_90 and sm_100. Float32 is multiplied from registers,
    which hold a part of a head and few keys at once."""
    if dtype == torch.float32:
        return TileConfig(rows=32, keys=16, depth=32, threads=256, stages=1)
    if _fits(size, dtype):
        return TileConfig(rows=64, keys=64, depth=128, threads=128 if size <= 64 else 256, stages=_stages())
    return TileConfig(rows=64, keys=32, depth=128, threads=256, stages=1)


def backward_q_config(size: int, dtype: torch.dtype) -> TileConfig:
    """Two tiles of scores beside one of sums: half as many keys for a wide head."""
    if dtype == torch.float32:
        return TileConfig(rows=16, keys=32, depth=32, threads=256, stages=1)
    if _fits(size, dtype):
        return TileConfig(rows=64, keys=64 if size <= 64 else 32, depth=128, threads=256, stages=_stages())
    return TileConfig(rows=64, keys=32, depth=128, threads=256, stages=1)


def backward_kv_config(size: int, dtype: torch.dtype) -> TileConfig:
    """Two tiles of scores beside two of sums, which have a row for each key: half as many rows for a wide head."""
    if dtype == torch.float32:
        return TileConfig(rows=16, keys=16, depth=32, threads=256, stages=1)
    if _fits(size, dtype):
        return TileConfig(rows=64 if size <= 64 else 32, keys=64, depth=128, threads=256, stages=_stages())
    return TileConfig(rows=32, keys=32, depth=128, threads=256, stages=1)


def _fits(size: int, dtype: torch.dtype) -> bool:
    """Whether a head of 16-bit values leaves registers for whole tiles: half of one has, and rows that allow wide
    accesses, where each other element would take an address."""
    return size <= 128 and size * dtype.itemsize % 16 == 0


def _stages() -> int:
    """AMD's shared memory is 64 KiB, a third of the others'."""
    return 1 if torch.version.hip else 2
