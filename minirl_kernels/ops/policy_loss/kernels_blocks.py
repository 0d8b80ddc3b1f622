"""Blocks of tokens: the programs of the kernels over tokens, and the place of a block in its response.

A response begins a block of its own, and each block has BLOCK tokens of one response at most. So the sum over a block
is the same wherever the response lies in its batch. The blocks of response i are numbered from
    first token // BLOCK + i
if responses are packed. This leaves room for all blocks of the response before, and the numbers need no prefix sum.

Names: i_ index, o_ offsets, m_ mask, b_ block of values.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_block(i_response, start, L, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """The number of the first block of a response. start: its first token."""
    return start // BLOCK + i_response if PACKED else i_response * tl.cdiv(L, BLOCK)


@triton.jit
def span_of_response(i_response, offsets, L, m_response):
    """(first token, end) of responses; offsets is None if they are rows of L tokens."""
    i_response = i_response.to(tl.int64)
    start = i_response * L
    end = start + L
    if offsets is not None:
        start = tl.load(offsets + i_response, mask=m_response, other=0).to(tl.int64)
        end = tl.load(offsets + i_response + 1, mask=m_response, other=0).to(tl.int64)
    return start, end


@triton.jit
def response_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK: tl.constexpr):
    """The response that a block belongs to: the last whose first block is not after it."""
    i_low = i_block * 0
    if offsets is None:
        i_low = i_block // tl.cdiv(L, BLOCK)
    else:
        i_high = i_low + num_responses
        for _ in range(search_steps):
            i_middle = (i_low + i_high) // 2
            start = tl.load(offsets + i_middle).to(tl.int64)
            is_after = first_block(i_middle, start, L, True, BLOCK) > i_block
            i_low, i_high = tl.where(is_after, i_low, i_middle), tl.where(is_after, i_middle, i_high)
    return i_low


@triton.jit
def tokens_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK: tl.constexpr):
    """(response, its first token, its end, offsets of the tokens of the block); tokens from the end on are none."""
    i_response = response_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK)
    start, end = span_of_response(i_response, offsets, L, True)
    i_first = first_block(i_response, start, L, offsets is not None, BLOCK)
    return i_response, start, end, start + (i_block - i_first) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def expm1(x):
    """exp(x) - 1 in float64, by its series for small x, where the difference would lose its digits."""
    series = x * 0 + 1
    for i in tl.static_range(15):
        series = series * (x * (1 / (16 - i))) + 1
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1)


@triton.jit
def largest(x):
    """The maximum of a block, NaN if it has a NaN."""
    return tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit
def put(sums, row, num_blocks, m_loss, b_x):
    """Write the sum of a block to a row of `sums`."""
    b_x = tl.where(m_loss, b_x.to(tl.float64), 0.0)
    tl.store(sums + row * tl.full([], num_blocks, tl.int64), tl.sum(b_x, 0))


@triton.jit
def load_float64(values, o, m_loss):
    return tl.load(values + o, mask=m_loss, other=0.0).to(tl.float32).to(tl.float64)
