"""Kernels that choose the rows of a linear loss: rows that can have a gradient, other rows of the loss, the rest.

The rows keep their order within the three kinds. The first kernel counts the kinds of each block of rows. The second
moves the values of each row to its place, and the third brings the results of the rows back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.triton.row_softmax import IGNORE_INDEX
from ...common.triton.row_tiles import unspecialized


@triton.jit
def kinds_of_rows(token_ids, advantages, o, m, V, WITH_BONUS: tl.constexpr):
    """(rows that can have a gradient, other rows of the loss).

    WITH_BONUS: a KL or an entropy term gives every row of the loss a gradient. An id out of range has one, NaN.
    """
    b_id = tl.load(token_ids + o, mask=m, other=IGNORE_INDEX)
    m_counted = b_id != IGNORE_INDEX
    m_gradient = m_counted
    if not WITH_BONUS:
        b_advantage = tl.load(advantages + o, mask=m_counted, other=0.0)
        m_gradient = m_counted & ((b_advantage != 0) | (b_id < 0) | (b_id >= V))
    return m_gradient, m_counted & ~m_gradient


@triton.jit
def sum_of_counts(counts, number, BLOCK: tl.constexpr):
    """(rows with a gradient, other rows of the loss) of the first `number` blocks."""
    with_gradient, others = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for i in range(tl.cdiv(number, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        with_gradient += tl.sum(tl.load(counts + 2 * o, mask=o < number, other=0), 0)
        others += tl.sum(tl.load(counts + 2 * o + 1, mask=o < number, other=0), 0)
    return with_gradient, others


@unspecialized()
def count_rows_kernel(token_ids, advantages, counts, num_rows, V, WITH_BONUS: tl.constexpr, BLOCK: tl.constexpr):
    i_block = tl.program_id(0).to(tl.int64)
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m_gradient, m_other = kinds_of_rows(token_ids, advantages, o, o < num_rows, V, WITH_BONUS)
    tl.store(counts + 2 * i_block, tl.sum(m_gradient.to(tl.int64), 0))
    tl.store(counts + 2 * i_block + 1, tl.sum(m_other.to(tl.int64), 0))


@triton.jit
def move(values, out, o, o_out, m, m_out):
    if values is not None:
        tl.store(out + o_out, tl.load(values + o, mask=m), mask=m_out)


@unspecialized()
def select_rows_kernel(
    token_ids,
    temperature,
    old_log_probs,
    behaviour_log_probs,
    ref_log_probs,
    advantages,
    weights,
    counts,
    out_ids,
    out_temperature,
    out_old,
    out_behaviour,
    out_ref,
    out_advantages,
    out_weights,
    index,
    place,
    is_valid,
    num_rows,
    num_chosen,
    V,
    WITH_BONUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the first num_chosen rows to their places. index: the row of each place; place: of each row, or -1.

    is_valid: whether all rows of the loss are among the chosen ones.
    """
    i_block = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(num_rows, BLOCK)
    all_with_gradient, all_others = sum_of_counts(counts, num_blocks, BLOCK)
    with_gradient, others = sum_of_counts(counts, i_block, BLOCK)
    if i_block == 0:
        tl.store(is_valid, (all_with_gradient + all_others <= num_chosen).to(tl.uint8))
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    m = o < num_rows
    m_gradient, m_other = kinds_of_rows(token_ids, advantages, o, m, V, WITH_BONUS)
    m_rest = m & ~m_gradient & ~m_other
    at_gradient = with_gradient + tl.cumsum(m_gradient.to(tl.int64), 0) - 1
    at_other = all_with_gradient + others + tl.cumsum(m_other.to(tl.int64), 0) - 1
    before = i_block * BLOCK - with_gradient - others
    at_rest = all_with_gradient + all_others + before + tl.cumsum(m_rest.to(tl.int64), 0) - 1
    b_place = tl.where(m_gradient, at_gradient, tl.where(m_other, at_other, at_rest))
    m_out = m & (b_place < num_chosen)
    tl.store(place + o, tl.where(m_out, b_place, -1), mask=m)
    tl.store(index + b_place, o, mask=m_out)
    move(token_ids, out_ids, o, b_place, m, m_out)
    move(temperature, out_temperature, o, b_place, m, m_out)
    move(old_log_probs, out_old, o, b_place, m, m_out)
    move(behaviour_log_probs, out_behaviour, o, b_place, m, m_out)
    move(ref_log_probs, out_ref, o, b_place, m, m_out)
    move(advantages, out_advantages, o, b_place, m, m_out)
    move(weights, out_weights, o, b_place, m, m_out)


@triton.jit
def spread(results, out, b_place, o, m):
    tl.store(out + o, tl.load(results + b_place, mask=m & (b_place >= 0), other=0.0), mask=m)


@unspecialized()
def spread_rows_kernel(
    place,
    log_probs,
    entropy,
    token_loss,
    token_grad,
    out_log_probs,
    out_entropy,
    out_loss,
    out_grad,
    num_rows,
    BLOCK: tl.constexpr,
):
    """Results of the chosen rows as results of all rows, 0 where a row was not chosen."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < num_rows
    b_place = tl.load(place + o, mask=m, other=-1)
    spread(log_probs, out_log_probs, b_place, o, m)
    spread(entropy, out_entropy, b_place, o, m)
    spread(token_loss, out_loss, b_place, o, m)
    spread(token_grad, out_grad, b_place, o, m)
