"""Kernels that sum the metrics and the loss over tokens: one program per block of tokens, then one for all blocks.

`metric_table.py` and `metrics.py` define the metrics in torch. A new metric needs its row here: `token_sums_kernel`
writes the rows of COUNTS and SUMS in their order, and the rows of MAXIMA. A test compares each row with its definition.
A row that is over responses is made by `totals_kernel`.

A sum is in float64: over a block in the order of its layout, over the blocks of a response in sequence, and over
responses in the order of 128 lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.triton.row_tiles import unspecialized
from .kernels_blocks import expm1, first_block, largest, load_float64, put, span_of_response, tokens_of_block
from .kernels_objective import at_most, bounds_met, kl_penalty, times, token_objective
from .kernels_responses import ratios_of_loss, share_of_token

# rows of the sums of a block. The first are COUNTS and SUMS, then the sums that only totals_kernel reads
NUM_SUMS = 19
LOG_W, W_MINUS_1, LOSS = tl.constexpr(19), tl.constexpr(20), tl.constexpr(21)
NUM_BLOCK_SUMS = 22
ALL_RESPONSES, ROLLOUT_RESPONSES, FIRST_ORDER_ERROR = tl.constexpr(1), tl.constexpr(5), tl.constexpr(18)
# rows of the maxima, MAXIMA; the last is over responses
NUM_MAXIMA = 4
NUM_BLOCK_MAXIMA = 3
LARGEST_ERROR = tl.constexpr(3)


@unspecialized()
def token_sums_kernel(
    log_probs,
    entropy,
    token_loss,
    token_grad,
    clip_high,
    clip_low,
    mask,
    weights,
    advantages,
    old_log_probs,
    rollout_log_probs,
    ref_log_probs,
    offsets,
    response_sums,
    log_mean,
    out_log_probs,
    out_entropy,
    out_loss,
    out_grad,
    out_entropy_grad,
    sums,
    maxima,
    low,
    high,
    most,
    log_most,
    lower,
    upper,
    threshold,
    kl_coef,
    entropy_coef,
    num_responses,
    num_blocks,
    L,
    search_steps,
    OBJECTIVE: tl.constexpr,
    LEVEL: tl.constexpr,
    CLIP: tl.constexpr,
    CORRECTION: tl.constexpr,
    BEYOND: tl.constexpr,
    WEIGHS: tl.constexpr,
    WEIGHTING: tl.constexpr,
    WITH_KL: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums and maxima of each block. It writes log_probs, entropy and token_loss, 0 where masked, and c_t.

    token_loss, token_grad, clip_high, clip_low: see TokenResults.
    out_entropy_grad: None if the loss has no entropy term. WITH_KL: whether ref_log_probs is in the loss.
    The other constants are fields of ObjectiveOptions, CorrectionOptions and LossOptions; OBJECTIVE may be None.
    """
    i_block = tl.program_id(0).to(tl.int64)
    i_response, start, end, o = tokens_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK)
    m = o < end
    m_loss = tl.load(mask + o, mask=m, other=0) != 0
    b_x = load_float64(log_probs, o, m_loss)
    b_old = b_x
    if old_log_probs is not None:
        b_old = load_float64(old_log_probs, o, m_loss)
    # a value is loaded, and a sum made, where few other values are in registers
    sums += i_block
    maxima += i_block
    stride = tl.full([], num_blocks, tl.int64)
    b_zero = tl.zeros([BLOCK], tl.float64)
    log_r, log_d, log_w, w = b_x - b_old, b_zero, b_zero, b_zero
    if rollout_log_probs is not None:
        b_rollout = load_float64(rollout_log_probs, o, m_loss)
        log_d, log_w = b_old - b_rollout, b_x - b_rollout
    i_first, number = first_block(i_response, start, L, offsets is not None, BLOCK), tl.cdiv(end - start, BLOCK)
    level_r, level_d, level_w, b_changed = ratios_of_loss(
        log_r,
        log_d,
        log_w,
        response_sums,
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
    num_tokens = tl.sum(tl.where(m_loss, b_zero + 1, 0.0), 0)
    tl.store(sums, num_tokens)  # the rows 0 to 5 are COUNTS, then come SUMS
    # totals_kernel makes the rows of responses
    tl.store(sums + ALL_RESPONSES * stride, 0.0)
    tl.store(sums + ROLLOUT_RESPONSES * stride, 0.0)
    tl.store(sums + FIRST_ORDER_ERROR * stride, 0.0)
    tl.store(sums + 2 * stride, num_tokens if entropy is not None else 0.0)
    tl.store(sums + 3 * stride, num_tokens if ref_log_probs is not None else 0.0)
    tl.store(sums + 4 * stride, num_tokens if rollout_log_probs is not None else 0.0)
    put(sums, 7, num_blocks, m_loss, -log_r)
    put(sums, 8, num_blocks, m_loss, expm1(log_r) - log_r)
    tl.store(maxima, largest(tl.abs(log_r)))
    if rollout_log_probs is not None:
        w = tl.where(m_loss, tl.exp(log_w), 0.0)
    put(sums, 14, num_blocks, m_loss, -log_d)
    put(sums, 15, num_blocks, m_loss, expm1(log_d) - log_d)
    put(sums, 16, num_blocks, m_loss, w)
    put(sums, 17, num_blocks, m_loss, w * w)
    put(sums, LOG_W, num_blocks, m_loss, log_w)
    put(sums, W_MINUS_1, num_blocks, m_loss, expm1(log_w))
    tl.store(maxima + stride, largest(tl.abs(log_d)))
    tl.store(maxima + 2 * stride, largest(w))

    b_truncated = b_changed | (tl.exp(level_w if WEIGHTING == "w in loss" else level_d) > threshold)
    put(sums, 11, num_blocks, m_loss, b_truncated)
    b_weight = tl.load(weights + o, mask=m_loss, other=0.0)
    b_advantage = tl.load(advantages + o, mask=m_loss, other=0.0)
    if OBJECTIVE is None:
        b_high = tl.load(clip_high + o, mask=m_loss, other=0)
        b_low = tl.load(clip_low + o, mask=m_loss, other=0)
    else:
        b_high, b_low = bounds_met(b_x, level_r, level_w, b_advantage, low, high, most, log_most, OBJECTIVE, CLIP)
    put(sums, 9, num_blocks, m_loss, b_high)
    put(sums, 10, num_blocks, m_loss, b_low)
    GIVEN: tl.constexpr = OBJECTIVE is not None and token_loss is not None
    if GIVEN:
        b_loss = tl.load(token_loss + o, mask=m_loss, other=0.0)
        b_grad = tl.load(token_grad + o, mask=m_loss, other=0.0)
    else:
        b_share = b_weight.to(tl.float64)
        if OBJECTIVE is None:
            b_loss = b_share * tl.load(token_loss + o, mask=m_loss, other=0.0)
            b_grad = b_share * tl.load(token_grad + o, mask=m_loss, other=0.0)
        else:
            b_loss, b_grad = token_objective(
                b_x,
                level_r,
                level_w,
                level_d,
                b_share * b_advantage,
                low,
                high,
                most,
                log_most,
                threshold,
                OBJECTIVE,
                CLIP,
            )
        if WEIGHTING == "d":
            b_d = at_most(tl.exp(level_d), threshold)
            b_loss, b_grad = times(b_d, b_loss), times(b_d, b_grad)
        if LEVEL == "sequence":  # the loss of the response in equal shares
            b_loss *= share_of_token(response_sums, i_first, number, num_blocks, BLOCK)
    log_k = b_zero
    if ref_log_probs is not None:
        b_ref = load_float64(ref_log_probs, o, m_loss)
        log_k = b_ref - b_x
        if WITH_KL and not GIVEN:
            b_kl, b_kl_grad = kl_penalty(b_share * kl_coef, b_x, b_ref, KL_ESTIMATOR)
            b_loss += b_kl
            b_grad += b_kl_grad
    put(sums, 13, num_blocks, m_loss, expm1(log_k) - log_k)
    if not GIVEN:
        b_loss, b_grad = b_loss.to(tl.float32), b_grad.to(tl.float32)
        # an overflow gives NaN in both, as in the reference
        m_fits = (tl.abs(b_loss) < float("inf")) & (tl.abs(b_grad) < float("inf"))
        b_loss, b_grad = tl.where(m_fits, b_loss, float("nan")), tl.where(m_fits, b_grad, float("nan"))
    put(sums, 6, num_blocks, m_loss, (b_loss != b_loss) | (b_grad != b_grad))
    b_entropy = b_zero
    if entropy is not None:
        b_entropy = load_float64(entropy, o, m_loss)
        tl.store(out_entropy + o, b_entropy.to(tl.float32), mask=m)
    put(sums, 12, num_blocks, m_loss, b_entropy)
    if out_entropy_grad is not None:
        b_entropy_grad = -entropy_coef * b_weight
        b_loss += b_entropy_grad * b_entropy.to(tl.float32)
        tl.store(out_entropy_grad + o, tl.where(m_loss, b_entropy_grad, 0.0), mask=m)
    b_loss = tl.where(m_loss, b_loss, 0.0)
    put(sums, LOSS, num_blocks, m_loss, b_loss)
    tl.store(out_log_probs + o, b_x.to(tl.float32), mask=m)
    tl.store(out_loss + o, b_loss, mask=m)
    tl.store(out_grad + o, tl.where(m_loss, b_grad, 0.0), mask=m)


@triton.jit
def row_of(b_sums, row, ROWS: tl.constexpr):
    """Row `row` of b_sums [ROWS, LANES]."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == row)[:, None], b_sums, 0.0), 0)


@unspecialized()
def totals_kernel(
    sums,
    maxima,
    offsets,
    out_loss,
    out_sums,
    out_maxima,
    num_responses,
    num_blocks,
    L,
    WITH_ROLLOUT: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_SUMS: tl.constexpr,
    NUM_MAXIMA: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums, the maxima and the loss of the call. Each lane adds the blocks of one response after another."""
    o_row, o_max = tl.arange(0, ROWS)[:, None], tl.arange(0, NUM_MAXIMA)[:, None]
    m_row, m_max = o_row <= LOSS, o_max < LARGEST_ERROR
    stride = tl.full([], num_blocks, tl.int64)
    b_totals = tl.zeros([ROWS, LANES], tl.float64)
    b_largest = tl.zeros([NUM_MAXIMA, LANES], tl.float64)
    for i in range(tl.cdiv(num_responses, LANES)):
        i_response = i * LANES + tl.arange(0, LANES)
        m_response = i_response < num_responses
        start, end = span_of_response(i_response, offsets, L, m_response)
        num_blocks_of = tl.where(m_response, tl.cdiv(end - start, BLOCK), 0)
        o_block = first_block(i_response, start, L, offsets is not None, BLOCK)
        b_sums = tl.zeros([ROWS, LANES], tl.float64)
        for i_block in range(tl.max(num_blocks_of, 0)):
            m_block = (i_block < num_blocks_of)[None, :]
            o = (o_block + i_block)[None, :]
            b_sums += tl.load(sums + o_row * stride + o, mask=m_row & m_block, other=0.0)
            b_here = tl.load(maxima + o_max * stride + o, mask=m_max & m_block, other=0.0)
            b_largest = tl.maximum(b_largest, b_here, propagate_nan=tl.PropagateNan.ALL)
        if WITH_ROLLOUT:
            b_error = tl.abs(expm1(row_of(b_sums, LOG_W, ROWS)) - row_of(b_sums, W_MINUS_1, ROWS))[None, :]
            b_sums = tl.where(o_row == FIRST_ORDER_ERROR, b_error, b_sums)
            b_error = tl.where(o_max == LARGEST_ERROR, b_error, 0.0)
            b_largest = tl.maximum(b_largest, b_error, propagate_nan=tl.PropagateNan.ALL)
        b_totals += b_sums
    b_total = tl.sum(b_totals, 1)
    o = tl.arange(0, ROWS)
    is_count = (o == ALL_RESPONSES) | ((o == ROLLOUT_RESPONSES) & WITH_ROLLOUT)
    b_total = tl.where(is_count, tl.full([], num_responses, tl.float64), b_total)
    tl.store(out_sums + o, b_total, mask=o < NUM_SUMS)
    tl.store(out_loss, tl.sum(tl.where(o == LOSS, b_total, 0.0), 0).to(tl.float32))
    m_nan = tl.max((b_largest != b_largest).to(tl.int32), 1) > 0
    tl.store(out_maxima + tl.arange(0, NUM_MAXIMA), tl.where(m_nan, float("nan"), tl.max(b_largest, 1)))
