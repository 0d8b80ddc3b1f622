"""Backward kernels of attention: one over blocks of rows for d q, one over blocks of keys for d k and d v."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...common.triton.config import is_whole
from ...common.triton.launch import Launch, prepared
from ...common.triton.numbers import LOG2E, round_to
from ...common.triton.row_tiles import multiple
from .kernels_shared import (
    KEYS,
    QUERIES,
    SIZES,
    SPANS,
    Operands,
    TileConfig,
    add_products,
    block_of,
    first_of_head,
    fits,
    load_rows,
    load_unless_split,
    multiplies_from_shared_memory,
    over_blocks,
    range_of_seen,
    row_products,
    rows_in,
    seen_by,
    span_at,
    stages,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SPANS)
def attention_bwd_q_kernel(
    q,
    k,
    v,
    spans,
    key_offsets,
    out,
    stats,
    grad_out,
    deltas,
    grad_q,
    c,
    scale,
    num_spans,
    batches,
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
    """Writes grad_q [B, Lq, Hq, D], unless it is None, and deltas [B, Lq, Hq], the sum of out * grad_out per row."""
    # the last blocks of a span see the most keys, so they start first
    program = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    i_span, i_block, rows = block_of(
        program, spans, num_spans, queries_of_batch, batches, GROUP, BLOCK_M, QUERIES, key_offsets is not None
    )
    if i_block * BLOCK_M >= rows:
        return
    head = tl.program_id(1).to(tl.int64)
    batch, first_query, queries, first_key, keys = span_at(spans, key_offsets, i_span)
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
        b_seen = seen_by(o_r, queries, keys, GROUP, CAUSAL)
        seen, seen_by_all = range_of_seen(b_seen, m_r, keys)
        b_shift = tl.load(stats + 2 * o_row, mask=m_r, other=0.0)
        b_sum = tl.load(stats + 2 * o_row + 1, mask=m_r, other=1.0)
        b_scale = 1.0 / tl.where(b_sum == 0, 1.0, b_sum)
        p_keys, stride_kl = first_of_head(k, batch, head, first_key, stride_kb, stride_kh, stride_kl, ALIGN)
        p_values, stride_vl = first_of_head(v, batch, head, first_key, stride_vb, stride_vh, stride_vl, ALIGN)
        o_n = tl.arange(0, BLOCK_N)
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for MASKED in tl.static_range(2):  # first the blocks of keys that all rows see
            whole = seen_by_all // BLOCK_N
            for i_n in range(whole * MASKED, tl.cdiv(seen, BLOCK_N) if MASKED else whole):
                o_key = i_n * BLOCK_N + o_n
                m_n = (o_key < seen)[:, None] if MASKED else tl.full([BLOCK_N, 1], True, tl.int1)
                p_k = p_keys + o_key[:, None] * stride_kl
                p_v = p_values + o_key[:, None] * stride_vl
                b_k = load_rows(p_k, m_n, D, BLOCK_D)
                b_v = load_unless_split(p_v, m_n, DV, BLOCK_DV, DEPTH)
                b_s = row_products(b_q, b_k, p_q, p_k, m_r, m_n, BLOCK_M, BLOCK_N, D, BLOCK_D, DEPTH)
                if MASKED:
                    b_s = tl.where(o_key[None, :] < b_seen, b_s, -float("inf"))
                b_p = tl.exp2((b_s - b_shift) * c) * b_scale
                b_dp = row_products(b_do, b_v, p_do, p_v, m_r, m_n, BLOCK_M, BLOCK_N, DV, BLOCK_DV, DEPTH)
                b_dq = add_products(round_to(b_p * (b_dp - b_delta), k.dtype.element_ty), b_k, b_dq, None)
        o_d = tl.arange(0, BLOCK_D)[None, :]
        b_dq = tl.where(m_r, b_dq * scale, 0.0)  # a row outside the span may have met a NaN
        tl.store(grad_q + o_row * D + o_d, round_to(b_dq, grad_q.dtype.element_ty), mask=(o_r < rows) & (o_d < D))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SPANS)
def attention_bwd_kv_kernel(
    q,
    k,
    v,
    spans,
    key_offsets,
    stats,
    grad_out,
    deltas,
    grad_k,
    grad_v,
    c,
    scale,
    num_spans,
    batches,
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
    """Writes grad_k [B, Lk, Hkv, D] and grad_v [B, Lk, Hkv, DV]; either may be None.

    Both are sums over the rows of the span, in blocks from its first row on.
    """
    of_keys = spans if key_offsets is None else key_offsets
    i_span, i_block, keys_of_slot = block_of(
        tl.program_id(0), of_keys, num_spans, keys_of_batch, batches, 1, BLOCK_N, KEYS, key_offsets is not None
    )
    if i_block * BLOCK_N >= keys_of_slot:
        return
    head = tl.program_id(1).to(tl.int64)
    batch, first_query, queries, first_key, keys = span_at(spans, key_offsets, i_span)
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
    rows = tl.where(i_block * BLOCK_N < keys, queries * GROUP, 0)
    # causal: the first row that sees the first of these keys, and the first row that sees them all
    first_row = tl.maximum(i_block * BLOCK_N - (keys - queries), 0) * GROUP if CAUSAL else 0 * rows
    last_key = tl.minimum((i_block + 1) * BLOCK_N, keys) - 1
    whole_row = tl.maximum(last_key - (keys - queries), 0) * GROUP if CAUSAL else 0 * rows
    begin = first_row // BLOCK_M
    blocks = tl.cdiv(rows, BLOCK_M)
    whole = tl.minimum(tl.cdiv(whole_row, BLOCK_M), blocks)
    for WHOLE in tl.static_range(2):  # last the blocks of rows that see all keys
        for i_m in range(whole if WHOLE else begin, blocks if WHOLE else whole):
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
            b_s = row_products(b_k, b_q, p_k, p_q, m_n, m_r, BLOCK_N, BLOCK_M, D, BLOCK_D, DEPTH)
            if not WHOLE:
                b_seen = seen_by(o_r, queries, keys, GROUP, CAUSAL)
                b_s = tl.where(o_key < b_seen[None, :], b_s, -float("inf"))
            # rows after the last have loaded 0 in b_q and b_do, so they add 0
            b_p = tl.exp2((b_s - b_shift[None, :]) * c) * (1.0 / tl.where(b_sum == 0, 1.0, b_sum))[None, :]
            if grad_v is not None:
                b_dv = add_products(round_to(b_p, v.dtype.element_ty), b_do, b_dv, None)
            if grad_k is not None:
                b_dp = row_products(b_v, b_do, p_v, p_do, m_n, m_r, BLOCK_N, BLOCK_M, DV, BLOCK_DV, DEPTH)
                b_dk = add_products(round_to(b_p * (b_dp - b_delta[None, :]), q.dtype.element_ty), b_q, b_dk, None)
    o_row = (batch * keys_of_batch + first_key + o_key) * tl.num_programs(1) + head
    m_stored = o_key < keys_of_slot
    o_d = tl.arange(0, BLOCK_D)[None, :]
    o_v = tl.arange(0, BLOCK_DV)[None, :]
    # a key outside the span may have met a NaN
    if grad_k is not None:
        b_dk = tl.where(m_n, b_dk * scale, 0.0)
        tl.store(grad_k + o_row * D + o_d, round_to(b_dk, grad_k.dtype.element_ty), mask=m_stored & (o_d < D))
    if grad_v is not None:
        b_dv = tl.where(m_n, b_dv, 0.0)
        tl.store(grad_v + o_row * DV + o_v, round_to(b_dv, grad_v.dtype.element_ty), mask=m_stored & (o_v < DV))


@prepared
def backward_q(*tensors: Any, causal: bool, scale: float) -> Launch:
    """Writes deltas [B, Lq, Hq] for backward_kv, and d q.

    tensors: the Operands, out, stats, grad_out, deltas, and grad_q or None.
    """
    operands = Operands(*tensors[:5])
    config = backward_q_config(*operands.kind)
    floats = scale * LOG2E.value, scale
    return over_blocks(
        attention_bwd_q_kernel, operands, operands.rows, config.rows, *floats, causal=causal, config=config
    )


@prepared
def backward_kv(*tensors: Any, causal: bool, scale: float) -> Launch:
    """Writes d k and d v.

    tensors: the Operands, stats, grad_out, deltas, grad_k or None, and grad_v or None.
    """
    operands = Operands(*tensors[:5])
    config = backward_kv_config(*operands.kind)
    floats = scale * LOG2E.value, scale
    return over_blocks(
        attention_bwd_kv_kernel, operands, operands.keys, config.keys, *floats, causal=causal, config=config
    )


def backward_q_config(size: int, dtype: torch.dtype, arch: str) -> TileConfig:
    """The registers hold two tiles of scores and one of sums: a wide head takes half as many keys.

    So does a float32 head of an odd size, whose elements each take an address. With the threads given here no float32
    tile spills.
    """
    if dtype == torch.float32:
        keys = 64 if size <= 128 and is_whole(size, dtype) else 32
        return TileConfig(rows=16, keys=keys, depth=32, threads=256 if 64 < size <= 128 else 128, stages=1)
    if fits(size, dtype) and multiplies_from_shared_memory(arch):
        return TileConfig(rows=64, keys=64, depth=128, threads=128, stages=stages())
    if is_whole(size, dtype) and multiplies_from_shared_memory(arch):
        return TileConfig(rows=64, keys=32, depth=256, threads=256, stages=2)
    if fits(size, dtype):
        return TileConfig(rows=64, keys=64 if size <= 64 else 32, depth=128, threads=256, stages=stages())
    rows = 32 if torch.version.hip and size > 128 else 64
    return TileConfig(rows=rows, keys=32, depth=128, threads=256, stages=1)


def backward_kv_config(size: int, dtype: torch.dtype, arch: str) -> TileConfig:
    """The registers hold two tiles of scores and two of sums, a row per key: a wide head takes half as many rows."""
    if dtype == torch.float32:
        return TileConfig(rows=16, keys=16, depth=16, threads=256, stages=1)
    if fits(size, dtype):
        keys = 128 if arch in ("sm_90", "") else 64  # 128 were measured on sm_90, and spill on sm_100
        return TileConfig(rows=64 if size <= 64 else 32, keys=keys, depth=128, threads=256, stages=stages())
    return TileConfig(rows=32, keys=32, depth=128, threads=256, stages=1)
