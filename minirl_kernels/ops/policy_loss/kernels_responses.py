"""Kernels for values of whole responses: sums of log-ratios, and the weights of a Correction.

`correction.py` and `reference.py` define them in torch. The first kernel sums over each block of tokens. The kernels
that need the sum of a response add the sums of its blocks, in an order that depends on the number of blocks alone. If
the weights are normalised, a second kernel computes their mean over the call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.triton.row_tiles import unspecialized
from .kernels_blocks import first_block, load_float64, put, span_of_response, tokens_of_block
from .kernels_objective import at_least, at_most, log_or_less

# rows of the sums of a block: tokens of the loss, log r, log d, tokens whose d is beyond the bounds, the weights of the
# tokens, and the tokens whose weight is not 0
TOKENS, LOG_R, LOG_D = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BEYOND_BOUNDS, WEIGHT, WEIGHTED = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
NUM_RESPONSE_SUMS = 6


@triton.jit
def weight_of_d(log_d, lower, upper, BEYOND: tl.constexpr, WEIGHS: tl.constexpr):
    """(log of the weight for log d at the level of the correction, whether d is beyond the bounds)."""
    lowest = log_or_less(tl.full([], lower, tl.float32).to(tl.float64))
    highest = tl.log(tl.full([], upper, tl.float32).to(tl.float64))
    beyond = (log_d < lowest) | (log_d > highest)
    if BEYOND == "truncate":
        log_weight = at_most(at_least(log_d, lowest), highest)
    else:
        log_weight = tl.where(beyond, -float("inf"), log_d if WEIGHS else tl.zeros_like(log_d))
    return log_weight, beyond


@triton.jit
def sum_of_response(sums, row, i_first, number, num_blocks, BLOCK: tl.constexpr):
    """The sum of a row over the `number` blocks of a response."""
    sums += row * tl.full([], num_blocks, tl.int64) + i_first
    b_sum = tl.zeros([BLOCK], tl.float64)
    for i in range(tl.cdiv(number, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        b_sum += tl.load(sums + o, mask=o < number, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def one_over(tokens):
    """1 / tokens, and 1 for no token, in float64. Two steps of Newton take fewer registers than a division."""
    tokens = at_least(tokens, 1.0)
    x = (1 / tokens.to(tl.float32)).to(tl.float64)
    x *= tl.fma(-tokens, x, x * 0 + 2)
    return x * tl.fma(-tokens, x, x * 0 + 2)


@triton.jit
def share_of_token(sums, i_first, number, num_blocks, BLOCK: tl.constexpr):
    """1 / the number of tokens of a response that are in the loss."""
    return one_over(sum_of_response(sums, TOKENS, i_first, number, num_blocks, BLOCK))


@triton.jit
def corrected(
    log_d,
    share,
    sums,
    log_mean,
    i_first,
    number,
    num_blocks,
    lower,
    upper,
    CORRECTION: tl.constexpr,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(log of the weights that replace d, whether a bound changes them) of the tokens of a block.

    log_d: log d of each token. share: 1 / the tokens of the response, for a level of "sequence_mean".
    i_first, number: the first block of the response and their number.
    """
    if CORRECTION == "sequence" or CORRECTION == "sequence_mean":
        log_d = tl.zeros_like(log_d) + sum_of_response(sums, LOG_D, i_first, number, num_blocks, BLOCK)
        if CORRECTION == "sequence_mean":
            log_d *= share
    log_weight, beyond = weight_of_d(log_d, lower, upper, BEYOND, WEIGHS)
    if BEYOND == "mask_response" and CORRECTION == "token":
        num_beyond = tl.zeros_like(log_d) + sum_of_response(sums, BEYOND_BOUNDS, i_first, number, num_blocks, BLOCK)
        beyond = num_beyond > 0
        log_weight = tl.where(beyond, -float("inf"), log_weight)
    if log_mean is not None:
        log_weight -= tl.load(log_mean)
    return log_weight, beyond


@triton.jit
def ratios_of_loss(
    log_r,
    log_d,
    log_w,
    sums,
    log_mean,
    i_first,
    number,
    num_blocks,
    lower,
    upper,
    LEVEL: tl.constexpr,
    CORRECTION: tl.constexpr,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(log r, log d, log w of TokenRatios, whether a bound of the correction changes the token).

    log_r, log_d, log_w: of each token; LEVEL is the level of the objective.
    """
    m_changed = log_r > float("inf")
    share = 1.0
    if LEVEL == "sequence_mean" or CORRECTION == "sequence_mean":
        share = share_of_token(sums, i_first, number, num_blocks, BLOCK)
    if CORRECTION == "none":
        log_d, log_w = tl.zeros_like(log_d), log_r
    elif CORRECTION != "plain":
        log_d, m_changed = corrected(
            log_d, share, sums, log_mean, i_first, number, num_blocks, lower, upper, CORRECTION, BEYOND, WEIGHS, BLOCK
        )
        log_w = log_r + log_d
    if LEVEL == "sequence" or LEVEL == "sequence_mean":
        log_r = tl.zeros_like(log_r) + sum_of_response(sums, LOG_R, i_first, number, num_blocks, BLOCK)
        if LEVEL == "sequence_mean":
            log_r *= share
        log_w = log_r + log_d
    return log_r, log_d, log_w, m_changed


@unspecialized()
def response_sums_kernel(
    log_probs,
    mask,
    old_log_probs,
    rollout_log_probs,
    offsets,
    sums,
    lower,
    upper,
    num_responses,
    num_blocks,
    L,
    search_steps,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of each block. old_log_probs: None means log_probs; one of them may be None.

    The rows of log r are 0 without log_probs, and the rows of d and of the weights are 0 without rollout_log_probs.
    """
    i_block = tl.program_id(0).to(tl.int64)
    _, _, end, o = tokens_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK)
    m_loss = tl.load(mask + o, mask=o < end, other=0) != 0
    log_r = tl.zeros([BLOCK], tl.float64)
    log_d, weight, beyond = log_r, log_r, m_loss & False
    if old_log_probs is not None:
        b_old = load_float64(old_log_probs, o, m_loss)
        if log_probs is not None:
            log_r = load_float64(log_probs, o, m_loss) - b_old
    else:
        b_old = load_float64(log_probs, o, m_loss)
    if rollout_log_probs is not None:
        log_d = b_old - load_float64(rollout_log_probs, o, m_loss)
        log_weight, beyond = weight_of_d(log_d, lower, upper, BEYOND, WEIGHS)
        weight = tl.exp(log_weight)
    sums += i_block
    put(sums, TOKENS, num_blocks, m_loss, tl.full([BLOCK], 1, tl.float64))
    put(sums, LOG_R, num_blocks, m_loss, log_r)
    put(sums, LOG_D, num_blocks, m_loss, log_d)
    put(sums, BEYOND_BOUNDS, num_blocks, m_loss, beyond)
    put(sums, WEIGHT, num_blocks, m_loss, weight)
    put(sums, WEIGHTED, num_blocks, m_loss, weight != 0)


@triton.jit
def load_row(sums, row, o_block, num_blocks, m_block):
    return tl.load(sums + row * tl.full([], num_blocks, tl.int64) + o_block, mask=m_block, other=0.0)


@unspecialized()
def mean_weight_kernel(
    sums,
    offsets,
    log_mean,
    lower,
    upper,
    num_responses,
    num_blocks,
    L,
    CORRECTION: tl.constexpr,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The log of the mean weight of the unmasked tokens, or of the unmasked responses; 0 if all are masked.

    Each lane adds the blocks of one response after another.
    """
    b_total, b_count = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for i in range(tl.cdiv(num_responses, LANES)):
        i_response = i * LANES + tl.arange(0, LANES)
        m_response = i_response < num_responses
        start, end = span_of_response(i_response, offsets, L, m_response)
        number = tl.where(m_response, tl.cdiv(end - start, BLOCK), 0)
        o_block = first_block(i_response, start, L, offsets is not None, BLOCK)
        tokens, log_d = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
        beyond, weight, weighted = log_d, log_d, log_d
        for i_block in range(tl.max(number, 0)):
            m_block, o = i_block < number, o_block + i_block
            tokens += load_row(sums, TOKENS, o, num_blocks, m_block)
            log_d += load_row(sums, LOG_D, o, num_blocks, m_block)
            beyond += load_row(sums, BEYOND_BOUNDS, o, num_blocks, m_block)
            weight += load_row(sums, WEIGHT, o, num_blocks, m_block)
            weighted += load_row(sums, WEIGHTED, o, num_blocks, m_block)
        if CORRECTION == "token":
            m_counts = (beyond == 0) | (BEYOND != "mask_response")
        else:
            if CORRECTION == "sequence_mean":
                log_d *= one_over(tokens)
            log_weight, _ = weight_of_d(log_d, lower, upper, BEYOND, WEIGHS)
            weight, weighted = tl.exp(log_weight), tl.full([LANES], 1, tl.float64)
            m_counts = (tokens > 0) & (weight != 0)
        b_total += tl.where(m_counts, weight, 0.0)
        b_count += tl.where(m_counts, weighted, 0.0)
    total, count = tl.sum(b_total, 0), tl.sum(b_count, 0)
    tl.store(log_mean, tl.log(tl.where(count > 0, total * one_over(count), 1.0)))


@unspecialized()
def behaviour_kernel(
    mask,
    old_log_probs,
    rollout_log_probs,
    offsets,
    sums,
    log_mean,
    out,
    lower,
    upper,
    num_responses,
    num_blocks,
    L,
    search_steps,
    CORRECTION: tl.constexpr,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """log mu of each token after the correction, float32; 0 where a token is not in the loss."""
    i_block = tl.program_id(0).to(tl.int64)
    i_response, start, end, o = tokens_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK)
    i_first, number = first_block(i_response, start, L, offsets is not None, BLOCK), tl.cdiv(end - start, BLOCK)
    m_loss = tl.load(mask + o, mask=o < end, other=0) != 0
    b_old = load_float64(old_log_probs, o, m_loss)
    log_d, share = b_old - load_float64(rollout_log_probs, o, m_loss), 1.0
    if CORRECTION == "sequence_mean":
        share = share_of_token(sums, i_first, number, num_blocks, BLOCK)
    log_d, _ = corrected(
        log_d, share, sums, log_mean, i_first, number, num_blocks, lower, upper, CORRECTION, BEYOND, WEIGHS, BLOCK
    )
    tl.store(out + o, tl.where(m_loss, b_old - log_d, 0.0).to(tl.float32), mask=o < end)


@unspecialized()
def ratios_kernel(
    log_probs,
    mask,
    old_log_probs,
    rollout_log_probs,
    offsets,
    sums,
    log_mean,
    out_log_prob,
    out_r,
    out_w,
    out_d,
    lower,
    upper,
    num_responses,
    num_blocks,
    L,
    search_steps,
    LEVEL: tl.constexpr,
    CORRECTION: tl.constexpr,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The fields of TokenRatios, float64, for an objective that has no function in the kernels."""
    i_block = tl.program_id(0).to(tl.int64)
    i_response, start, end, o = tokens_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK)
    i_first, number = first_block(i_response, start, L, offsets is not None, BLOCK), tl.cdiv(end - start, BLOCK)
    m = o < end
    m_loss = tl.load(mask + o, mask=m, other=0) != 0
    b_x = load_float64(log_probs, o, m_loss)
    b_old = b_x
    if old_log_probs is not None:
        b_old = load_float64(old_log_probs, o, m_loss)
    b_rollout = b_old
    if rollout_log_probs is not None:
        b_rollout = load_float64(rollout_log_probs, o, m_loss)
    log_r, log_d, log_w, _ = ratios_of_loss(
        b_x - b_old,
        b_old - b_rollout,
        b_x - b_rollout,
        sums,
        log_mean,
        i_first,
        number,
        num_blocks,
        lower,
        upper,
        LEVEL,
        CORRECTION,
        BEYOND,
        WEIGHS,
        BLOCK,
    )
    tl.store(out_log_prob + o, b_x, mask=m)
    tl.store(out_r + o, log_r, mask=m)
    tl.store(out_w + o, log_w, mask=m)
    tl.store(out_d + o, log_d, mask=m)
