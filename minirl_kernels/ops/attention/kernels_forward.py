"""Forward kernel of attention: a program computes a block of rows, and loops over the keys that the rows see."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ...common.triton.config import is_whole
from ...common.triton.launch import Launch, prepared
from ...common.triton.numbers import LOG2E, LOWEST, round_to
from ...common.triton.row_tiles import multiple
from .kernels_shared import (
    QUERIES,
    SIZES,
    SPANS,
    Operands,
    TileConfig,
    add_products,
    assert_sound,
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
def attention_fwd_kernel(
    q,
    k,
    v,
    spans,
    key_offsets,
    out,
    stats,
    c,
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
    """Writes out [B, Lq, Hq, DV], and the shift and the sum of each row to stats [B, Lq, Hq, 2] unless it is None.

    c: scale of the scores times log2(e), for exp2.
    """
    # the last blocks of a span see the most keys, so they start first
    program = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    i_span, i_block, rows = block_of(
        program, spans, num_spans, queries_of_batch, batches, GROUP, BLOCK_M, QUERIES, key_offsets is not None
    )
    # every span is checked by one program, and each program checks the span that it reads
    of_program = tl.minimum(program, num_spans) - 1
    assert_sound(spans, key_offsets, of_program, num_spans, batches, queries_of_batch, keys_of_batch)
    assert_sound(spans, key_offsets, i_span, num_spans, batches, queries_of_batch, keys_of_batch)
    if i_block * BLOCK_M >= rows:
        return
    head = tl.program_id(1).to(tl.int64)
    batch, first_query, queries, first_key, keys = span_at(spans, key_offsets, i_span)
    begin = batch * queries_of_batch + first_query  # one number to keep in the loop rather than three
    o_r = i_block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_r = o_r < queries * GROUP
    strides_q = (multiple(stride_qb, ALIGN), multiple(stride_qh, ALIGN), multiple(stride_ql, ALIGN))
    p_q = q + rows_in(batch, first_query, o_r, head, GROUP, strides_q[0], strides_q[1], strides_q[2])
    b_q = load_unless_split(p_q, m_r, D, BLOCK_D, DEPTH)
    b_seen = seen_by(o_r, queries, keys, GROUP, CAUSAL)
    seen, seen_by_all = range_of_seen(b_seen, m_r, keys)
    p_keys, stride_kl = first_of_head(k, batch, head, first_key, stride_kb, stride_kh, stride_kl, ALIGN)
    p_values, stride_vl = first_of_head(v, batch, head, first_key, stride_vb, stride_vh, stride_vl, ALIGN)
    o_n = tl.arange(0, BLOCK_N)
    b_shift = tl.full([BLOCK_M, 1], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M, 1], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for MASKED in tl.static_range(2):  # first the blocks of keys that all rows see
        whole = seen_by_all // BLOCK_N
        for i_n in range(whole * MASKED, tl.cdiv(seen, BLOCK_N) if MASKED else whole):
            o_key = i_n * BLOCK_N + o_n
            m_n = (o_key < seen)[:, None] if MASKED else tl.full([BLOCK_N, 1], True, tl.int1)
            p_k = p_keys + o_key[:, None] * stride_kl
            b_k = load_unless_split(p_k, m_n, D, BLOCK_D, DEPTH)
            b_s = row_products(b_q, b_k, p_q, p_k, m_r, m_n, BLOCK_M, BLOCK_N, D, BLOCK_D, DEPTH)
            if MASKED:
                b_s = tl.where(o_key[None, :] < b_seen, b_s, -float("inf"))
            b_max = tl.maximum(b_shift, tl.max(b_s, 1)[:, None])
            b_e = tl.exp2((b_s - b_max) * c)
            b_keep = tl.exp2((b_shift - b_max) * c)
            b_sum = tl.fma(b_sum, b_keep, tl.sum(b_e, 1)[:, None])
            b_v = load_rows(p_values + o_key[:, None] * stride_vl, m_n, DV, BLOCK_DV)
            b_out = add_products(round_to(b_e, v.dtype.element_ty), b_v, b_out, b_keep)
            b_shift = b_max
    o_v = tl.arange(0, BLOCK_DV)[None, :]
    # a row that sees no key gives 0 / 1; a row outside the span may have met a NaN
    b_out = tl.where(m_r, b_out / tl.where(b_sum == 0, 1.0, b_sum), 0.0)
    heads = tl.num_programs(1) * GROUP
    o_row = rows_in(0, begin, o_r, head, GROUP, 0, 1, heads)
    tl.store(out + o_row * DV + o_v, round_to(b_out, out.dtype.element_ty), mask=(o_r < rows) & (o_v < DV))
    if stats is not None:
        tl.store(stats + 2 * o_row, b_shift, mask=m_r)
        tl.store(stats + 2 * o_row + 1, b_sum, mask=m_r)


@prepared
def attend(*tensors: Any, causal: bool, scale: float) -> Launch:
    """Writes out [B, Lq, Hq, Dv] and the rows of all spans in stats [B, Lq, Hq, 2] float32; both are contiguous.

    tensors: the Operands, out, and stats or None.
    Asserts on the device that the spans are sound.
    """
    operands = Operands(*tensors[:5])
    config = attention_config(*operands.kind)
    return over_blocks(
        attention_fwd_kernel,
        operands,
        operands.rows,
        config.rows,
        scale * LOG2E.value,
        causal=causal,
        config=config,
        # without the other assertions that the option debug turns on
        debug=True,
        sanitize_overflow=False,
    )


def attention_config(size: int, dtype: torch.dtype, arch: str) -> TileConfig:
    """64 rows are the fewest that tensor cores multiply at once on sm_90 and sm_100.

    Float32 operands are multiplied from registers, which hold only a part of a head and few keys at once.
    """
    if dtype == torch.float32:
        threads = 128 if 64 < size <= 128 else 256
        return TileConfig(rows=32, keys=32 if size <= 64 else 16, depth=32, threads=threads, stages=1)
    if fits(size, dtype):
        few = size <= 64 or multiplies_from_shared_memory(arch)
        keys = 32 if size > 64 and arch in ("sm_100", "sm_103") else 64  # 64 spill there without a causal mask
        return TileConfig(rows=64, keys=keys, depth=128, threads=128 if few else 256, stages=stages())
    if is_whole(size, dtype) and multiplies_from_shared_memory(arch):
        return TileConfig(rows=64, keys=32, depth=256, threads=256, stages=2)
    return TileConfig(rows=64, keys=32, depth=128, threads=256, stages=1)
