"""Kernels that make the inputs of a loss: the mask, the weight and the values of each token.

`aggregation.py` defines the weights. The first kernel counts the tokens of each block that are in the loss. If the loss
is a mean over groups, it also finds the first response of each group. The second kernel sums the counts that a weight
divides by, and writes all values per token. Counts are integers, so no order changes their sums.

A tensor has two strides, of responses and of tokens; the stride of responses is 0 if they are packed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...common.triton.row_softmax import IGNORE_INDEX
from ...common.triton.row_tiles import unspecialized
from .kernels_blocks import first_block, tokens_of_block


@triton.jit
def in_loss(token_ids, loss_mask, o_id, o_mask, m_token):
    """Whether each token of a block is in the loss. token_ids and loss_mask may be None."""
    if loss_mask is not None:
        m_token &= tl.load(loss_mask + o_mask, mask=m_token, other=0) != 0
    if token_ids is not None:
        m_token &= tl.load(token_ids + o_id, mask=m_token, other=IGNORE_INDEX) != IGNORE_INDEX
    return m_token


@triton.jit
def copy_offsets(cu_seqlens, offsets, is_valid, num_responses, num_tokens, BLOCK: tl.constexpr):
    """Write cu_seqlens as int64, and whether it starts at 0, never falls and ends at the number of tokens."""
    faults = tl.full([], 0, tl.int32)
    for i in range(tl.cdiv(num_responses + 1, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        b_start = tl.load(cu_seqlens + o, mask=o <= num_responses, other=0).to(tl.int64)
        b_end = tl.load(cu_seqlens + o + 1, mask=o < num_responses, other=0).to(tl.int64)
        m_fault = ((o < num_responses) & (b_end < b_start)) | ((o == 0) & (b_start != 0))
        m_fault |= (o == num_responses) & (b_start != num_tokens)
        faults += tl.sum(m_fault.to(tl.int32), 0)
        tl.store(offsets + o, b_start, mask=o <= num_responses)
    tl.store(is_valid, (faults == 0).to(tl.uint8))


@triton.jit
def number_in_group(group_ids, number, group, BLOCK: tl.constexpr):
    """How many of the first `number` responses are in the group."""
    count = tl.full([], 0, tl.int32)
    for i in range(tl.cdiv(number, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        m = o < number
        count += tl.sum((m & (tl.load(group_ids + o, mask=m, other=0).to(tl.int64) == group)).to(tl.int32), 0)
    return count


@unspecialized()
def count_kernel(
    token_ids,
    loss_mask,
    cu_seqlens,
    group_ids,
    counts,
    block_groups,
    is_first,
    offsets,
    is_valid,
    num_responses,
    L,
    num_tokens,
    search_steps,
    id_stride_b,
    id_stride_l,
    mask_stride_b,
    mask_stride_l,
    BLOCK: tl.constexpr,
):
    """The number of tokens in the loss of each block, and the group of its response.

    The first program of a response writes whether no response before has its group. The first program of all checks
    the offsets. Offsets that are wrong read nothing out of bounds.
    """
    i_block = tl.program_id(0).to(tl.int64)
    if cu_seqlens is not None:  # noqa: SIM102  Triton compiles no `and` of a constant and a value
        if i_block == 0:
            copy_offsets(cu_seqlens, offsets, is_valid, num_responses, num_tokens, BLOCK)
    i_response, start, end, o = tokens_of_block(i_block, cu_seqlens, num_responses, L, search_steps, BLOCK)
    m = (o >= start) & (o < end) & (o >= 0) & (o < num_tokens)
    o_l = o if cu_seqlens is not None else o - start
    o_id, o_mask = i_response * id_stride_b + o_l * id_stride_l, i_response * mask_stride_b + o_l * mask_stride_l
    b_count = tl.sum(in_loss(token_ids, loss_mask, o_id, o_mask, m).to(tl.int32), 0)
    tl.store(counts + i_block, b_count)
    if group_ids is not None:
        group = tl.load(group_ids + i_response).to(tl.int64)
        tl.store(block_groups + i_block, group)
        if i_block == first_block(i_response, start, L, cu_seqlens is not None, BLOCK):
            tl.store(is_first + i_response, (number_in_group(group_ids, i_response, group, BLOCK) == 0).to(tl.int32))


@triton.jit
def total(counts, i_first, number, BLOCK: tl.constexpr):
    """The sum of `number` counts from i_first on."""
    count = tl.full([], 0, tl.int32)
    for i in range(tl.cdiv(number, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        count += tl.sum(tl.load(counts + i_first + o, mask=o < number, other=0), 0)
    return count


@triton.jit
def tokens_of_group(counts, block_groups, group, num_blocks, BLOCK: tl.constexpr):
    """The sum of the counts of all blocks whose response is in the group."""
    tokens = tl.full([], 0, tl.int32)
    for i in range(tl.cdiv(num_blocks, BLOCK)):
        o = i * BLOCK + tl.arange(0, BLOCK)
        m = o < num_blocks
        m &= tl.load(block_groups + o, mask=m, other=0) == group
        tokens += tl.sum(tl.load(counts + o, mask=m, other=0), 0)
    return tokens


@triton.jit
def weight_of_response(
    i_block,
    i_response,
    start,
    end,
    counts,
    block_groups,
    is_first,
    count,
    count_tensor,
    scale,
    num_responses,
    num_blocks,
    L,
    MODE: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weight of the tokens of a response. count, count_tensor: the caller's count; None means the count here."""
    if count_tensor is not None:
        divisor = tl.load(count_tensor).to(tl.float32)
        divisor = tl.where((divisor > 0) & (divisor < float("inf")), divisor, float("nan"))
    elif count is not None:
        divisor = tl.full([], count, tl.float32)
    elif MODE == "token-mean":
        divisor = tl.maximum(total(counts, 0, num_blocks, BLOCK), 1).to(tl.float32)
    else:
        tl.static_assert(MODE == "group-token-mean")
        divisor = total(is_first, 0, num_responses, BLOCK).to(tl.float32)
    if MODE == "group-token-mean":
        group = tl.load(block_groups + i_block)
        divisor *= tl.maximum(tokens_of_group(counts, block_groups, group, num_blocks, BLOCK), 1).to(tl.float32)
    weight = tl.div_rn(divisor * 0 + 1, divisor)
    if MODE == "seq-mean-token-mean":
        i_first = first_block(i_response, start, L, PACKED, BLOCK)
        tokens = tl.maximum(total(counts, i_first, tl.cdiv(end - start, BLOCK), BLOCK), 1)
        weight = tl.div_rn(weight, tokens.to(tl.float32))
    if MODE == "seq-mean-token-sum-norm":
        weight = tl.div_rn(weight, tl.full([], scale, tl.float32))
    return weight


@triton.jit
def copy_float(values, out, o_in, o, m_token, m_loss, m_finite):
    """Write values as float32, 0 for tokens that are not in the loss. Returns m_finite & whether they are finite."""
    if values is not None:
        b_x = tl.load(values + o_in, mask=m_loss, other=0.0).to(tl.float32)
        tl.store(out + o, b_x, mask=m_token)
        m_finite &= tl.abs(b_x) < float("inf")
    return m_finite


@unspecialized()
def inputs_kernel(
    token_ids,
    loss_mask,
    old_log_probs,
    rollout_log_probs,
    ref_log_probs,
    advantages,
    weights,
    offsets,
    counts,
    block_groups,
    is_first,
    count_tensor,
    out_ids,
    out_mask,
    out_weights,
    out_old,
    out_rollout,
    out_ref,
    out_advantages,
    count,
    scale,
    num_responses,
    num_blocks,
    L,
    search_steps,
    id_stride_b,
    id_stride_l,
    mask_stride_b,
    mask_stride_l,
    old_stride_b,
    old_stride_l,
    rollout_stride_b,
    rollout_stride_l,
    ref_stride_b,
    ref_stride_l,
    advantage_stride_b,
    advantage_stride_l,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All values per token. MODE: PolicyLossConfig.loss_agg_mode, or "given" if the weights are given.

    An advantage is NaN where a value of its token in the loss is not finite.
    """
    PACKED: tl.constexpr = offsets is not None
    i_block = tl.program_id(0).to(tl.int64)
    i_response, start, end, o = tokens_of_block(i_block, offsets, num_responses, L, search_steps, BLOCK)
    m = o < end
    o_l = o if PACKED else o - start
    o_id = i_response * id_stride_b + o_l * id_stride_l
    m_loss = in_loss(token_ids, loss_mask, o_id, i_response * mask_stride_b + o_l * mask_stride_l, m)
    tl.store(out_mask + o, m_loss.to(tl.uint8), mask=m)
    if token_ids is not None:
        b_id = tl.load(token_ids + o_id, mask=m_loss, other=IGNORE_INDEX)
        tl.store(out_ids + o, b_id, mask=m)
    if MODE == "given":
        b_weight = tl.load(weights + o, mask=m_loss, other=0.0)
    else:
        b_weight = weight_of_response(
            i_block,
            i_response,
            start,
            end,
            counts,
            block_groups,
            is_first,
            count,
            count_tensor,
            scale,
            num_responses,
            num_blocks,
            L,
            MODE,
            PACKED,
            BLOCK,
        )
    tl.store(out_weights + o, tl.where(m_loss, b_weight, 0.0), mask=m)
    o_old = i_response * old_stride_b + o_l * old_stride_l
    o_rollout = i_response * rollout_stride_b + o_l * rollout_stride_l
    o_ref = i_response * ref_stride_b + o_l * ref_stride_l
    m_finite = copy_float(old_log_probs, out_old, o_old, o, m, m_loss, m)
    m_finite = copy_float(rollout_log_probs, out_rollout, o_rollout, o, m, m_loss, m_finite)
    m_finite = copy_float(ref_log_probs, out_ref, o_ref, o, m, m_loss, m_finite)
    if advantages is not None:
        o_advantage = i_response * advantage_stride_b + o_l * advantage_stride_l
        b_advantage = tl.load(advantages + o_advantage, mask=m_loss, other=0.0).to(tl.float32)
        m_finite &= tl.abs(b_advantage) < float("inf")
        tl.store(out_advantages + o, tl.where(m_finite | ~m_loss, b_advantage, float("nan")), mask=m)
