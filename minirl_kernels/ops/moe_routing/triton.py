"""GPU backend of moe_routing: one program per token, with the router logits of the token in one tile.

Natural and replayed calls run the same binary, so that equal experts give equal bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.alignment import aligned, aligned_vector, memory_for
from ...common.triton.config import LaunchConfig
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.row_tiles import load_tile, multiple, row_pointer, store_tile, tile_offsets, unspecialized
from ...common.triton.sizes import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
# a rank has the order of the score in its upper bits, and 0xFFFF - expert in its lower 16 bits
PLACE = tl.constexpr(0xFFFF)
NOTHING = tl.constexpr(-(2**62))


@triton.jit
def scores_of(b_x, shift, SIGMOID: tl.constexpr):
    """The scores times e^-shift: e^(x - shift), or for a sigmoid e^(min(x, 0) - shift) / (1 + e^-|x|)."""
    if SIGMOID:
        b_negative = tl.where(b_x > 0, 0.0, b_x)
        return tl.exp2((b_negative - shift) * LOG2E) / (1.0 + tl.exp2(-tl.abs(b_x) * LOG2E))
    return tl.exp2((b_x - shift) * LOG2E)


@triton.jit
def shift_of(b_x, SIGMOID: tl.constexpr):
    shift = tl.max(b_x)
    if SIGMOID:
        shift = tl.minimum(shift, 0.0)
    return shift


@triton.jit
def ranked(b_s, i_place):
    """int64 ranks of the scores: a lower place ranks higher among equal scores, -0 equals 0, NaN ranks highest."""
    b_s = tl.where(b_s == 0, 0.0, b_s)
    b_bits = b_s.to(tl.int32, bitcast=True)
    b_key = tl.where(b_s == b_s, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return ((b_key.to(tl.int64) << 16) | PLACE) - i_place


@triton.jit
def place_of(ranked_one):
    return (ranked_one & PLACE) ^ PLACE


@triton.jit
def score_of(ranked_one):
    key = (ranked_one >> 16).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def element(b_values, o_k, k):
    """Element k of a block, as a scalar."""
    return tl.sum(tl.where(o_k == k, b_values, 0))


@triton.jit
def keep_best_groups(b_ranked, o_e, V, NUM_GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr, G_BLOCK: tl.constexpr):
    """Replace ranks by NOTHING outside the TOP_K_GROUPS groups with the largest sums of their two best scores."""
    o_g = tl.arange(0, G_BLOCK)
    b_group = o_e // (V // NUM_GROUPS)
    b_groups = tl.full([G_BLOCK], NOTHING, tl.int64)
    for i_g in range(NUM_GROUPS):
        b_own = tl.where(b_group == i_g, b_ranked, NOTHING)
        best = tl.max(b_own)
        second = tl.max(tl.where(b_own == best, NOTHING, b_own))
        b_groups = tl.where(o_g == i_g, ranked(score_of(best) + score_of(second), i_g), b_groups)
    m_kept = b_group < 0
    for _ in range(TOP_K_GROUPS):
        best = tl.max(b_groups)
        m_kept = m_kept | (b_group == place_of(best))
        b_groups = tl.where(b_groups == best, NOTHING, b_groups)
    return tl.where(m_kept, b_ranked, NOTHING)


@triton.jit
def load_ids(p_ids, m_k, o_k, size, unused_bits):
    """int64 ids from the bytes at p_ids, `size` for each id. unused_bits: 64 less the bits of a signed id, else 0."""
    b_ids = tl.zeros_like(o_k).to(tl.int64)
    for i in range(8):
        b_byte = tl.load(p_ids + o_k * size + i, mask=m_k & (i < size), other=0)
        b_ids |= b_byte.to(tl.int64) << (8 * i)
    return (b_ids << unused_bits) >> unused_bits


@unspecialized(aligned=["bias"])
def moe_routing_fwd_kernel(
    logits,
    bias,
    routed_experts,
    valid,
    weights,
    experts,
    natural_experts,
    agreement,
    mass,
    margin,
    scale,
    V,
    stride_l,
    replay,
    stride_ids,
    id_size,
    unused_bits,
    stride_valid,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    G_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """routed_experts and valid are bytes. replay: 0 for no row, 1 for all rows, 2 for the rows that are valid."""
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    o_e = tile_offsets(LANES, VEC)
    o_k = tl.arange(0, K_BLOCK)
    m_k = o_k < K
    p_row = row_pointer(logits, i_t * multiple(stride_l, ALIGN), ALIGN)
    b_x = load_tile(p_row, 0, V, LANES, VEC).to(tl.float32)
    shift = shift_of(b_x, SIGMOID)
    b_t = scores_of(b_x, shift, SIGMOID)
    total = tl.sum(b_t)

    b_selection = b_x
    if NUM_GROUPS > 1 or bias is not None:
        b_selection = scores_of(b_x, 0.0, True) if SIGMOID else b_t / total
        if bias is not None:
            b_selection += tl.load(bias + o_e, mask=o_e < V, other=0.0)
    b_ranked = tl.where(o_e < V, ranked(b_selection, o_e), NOTHING)
    if NUM_GROUPS > 1:
        b_ranked = keep_best_groups(b_ranked, o_e, V, NUM_GROUPS, TOP_K_GROUPS, G_BLOCK)
    b_natural = tl.zeros([K_BLOCK], tl.int64)
    last = tl.max(b_ranked)
    for k in range(K):
        last = tl.max(b_ranked)
        b_natural = tl.where(o_k == k, place_of(last), b_natural)
        b_ranked = tl.where(b_ranked == last, NOTHING, b_ranked)
    following = tl.max(b_ranked)
    kth = score_of(last)
    next_one = score_of(following)
    b_margin = tl.where(kth == next_one, 0.0, kth - next_one)  # 0 for two equal infinities, whose difference is NaN
    b_margin = tl.where(following == NOTHING, float("inf"), b_margin)

    replays = (replay == 1) | (tl.load(valid + i_t * stride_valid, mask=replay == 2, other=0) != 0)
    b_ids = load_ids(routed_experts + i_t * stride_ids, m_k & replays, o_k, id_size, unused_bits)
    b_ids = tl.where(replays, b_ids, b_natural)
    outside = tl.sum((m_k & ((b_ids < 0) | (b_ids >= V))).to(tl.int32))
    same, shared = 0, 0
    for k in range(K):
        i_e = element(b_ids, o_k, k)
        same += tl.sum((m_k & (b_ids == i_e)).to(tl.int32))
        shared += tl.sum((m_k & (b_natural == i_e)).to(tl.int32))
    is_bad = (outside > 0) | (same > K)
    b_ids = tl.where(is_bad, b_natural, b_ids)

    b_xk = tl.load(p_row + b_ids, mask=m_k, other=-float("inf")).to(tl.float32)
    b_mass = tl.sum(scores_of(b_xk, shift, SIGMOID)) / total
    if NORMALIZE:
        b_tk = scores_of(b_xk, shift_of(b_xk, SIGMOID), SIGMOID)
        b_w = b_tk / tl.sum(b_tk)
    elif SIGMOID:
        b_w = scores_of(b_xk, 0.0, True)
    else:
        b_w = scores_of(b_xk, shift, False) / total
    is_broken = is_bad | (total != total)
    tl.store(weights + i_t * K + o_k, tl.where(is_broken, float("nan"), b_w * scale), mask=m_k)
    tl.store(experts + i_t * K + o_k, b_ids, mask=m_k)
    tl.store(natural_experts + i_t * K + o_k, b_natural, mask=m_k)
    tl.store(agreement + i_t, tl.where(is_bad, float("nan"), shared.to(tl.float32) / K))
    tl.store(mass + i_t, tl.where(is_bad, float("nan"), b_mass))
    tl.store(margin + i_t, b_margin)


@unspecialized()
def moe_routing_bwd_kernel(
    logits,
    weights,
    experts,
    grad_weights,
    out,
    scale,
    V,
    stride_l,
    out_stride_l,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIGMOID: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """d w_i / d x_j = w_i (1[i = j] - p_j) for softmax scores, where p is the normalised weights or the softmax.

    Sigmoid scores: the term 1[i = j] - p_j has the further factor 1 - s_j, and p_j is 0 unless NORMALIZE.
    """
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    o_e = tile_offsets(LANES, VEC)
    o_k = tl.arange(0, K_BLOCK)
    m_k = o_k < K
    p_row = row_pointer(logits, i_t * multiple(stride_l, ALIGN), ALIGN)
    b_ids = tl.load(experts + i_t * K + o_k, mask=m_k, other=0)
    b_w = tl.load(weights + i_t * K + o_k, mask=m_k, other=0.0)
    b_g = tl.load(grad_weights + i_t * K + o_k, mask=m_k, other=0.0)
    dot = tl.sum(b_w * b_g)
    if NORMALIZE:
        b_g -= dot / scale
    b_gk = b_w * b_g
    if SIGMOID:
        b_gk *= scores_of(-tl.load(p_row + b_ids, mask=m_k, other=0.0).to(tl.float32), 0.0, True)
    b_grad = tl.zeros([LANES, VEC], tl.float32)
    if not NORMALIZE and not SIGMOID:
        b_x = load_tile(p_row, 0, V, LANES, VEC).to(tl.float32)
        b_t = scores_of(b_x, shift_of(b_x, False), False)
        b_grad -= b_t * (dot / tl.sum(b_t))
    for k in range(K):
        b_grad += tl.where(o_e == element(b_ids, o_k, k), element(b_gk, o_k, k), 0.0)
    p_out = row_pointer(out, i_t * multiple(out_stride_l, ALIGN), ALIGN)
    store_tile(p_out, b_grad, 0, V, LANES, VEC)


def forward(
    router_logits: Tensor,
    top_k: int,
    routed_experts: Tensor | None,
    valid: Tensor | None,
    norm_topk_prob: bool,
    scoring: str,
    correction_bias: Tensor | None,
    num_groups: int,
    top_k_groups: int,
    scale: float,
) -> tuple[Tensor | list[Tensor], ...]:
    """(weights, experts, agreement, mass, margin, [natural_experts]); [] without routed_experts."""
    tokens = router_logits.shape[0]
    router_logits = aligned(router_logits, 16 // router_logits.element_size())
    weights = router_logits.new_empty((tokens, top_k), dtype=torch.float32)
    experts = torch.empty_like(weights, dtype=torch.int64)
    agreement = weights.new_empty(tokens)
    mass, margin = torch.empty_like(agreement), torch.empty_like(agreement)
    natural = [] if routed_experts is None else [torch.empty_like(experts)]
    replayed = _replayed(routed_experts, valid, nothing=experts)
    _forward(
        router_logits,
        aligned_vector(correction_bias),
        replayed.ids,
        replayed.valid,
        weights,
        experts,
        natural[0] if natural else experts,
        agreement,
        mass,
        margin,
        sizes=replayed.sizes,
        groups=(num_groups, top_k_groups),
        norm_topk_prob=norm_topk_prob,
        scoring=scoring,
        scale=scale,
    )
    return weights, experts, agreement, mass, margin, natural


@prepared
def _forward(
    logits: Tensor,
    *tensors: Tensor | None,
    sizes: tuple[int, ...],
    groups: tuple[int, int],
    norm_topk_prob: bool,
    scoring: str,
    scale: float,
) -> Launch:
    """sizes: of _Replayed. groups: their number, and the number of groups that a token keeps."""
    weights: Any = tensors[3]
    tokens, top_k = weights.shape
    num_groups, top_k_groups = groups
    return over_rows(
        moe_routing_fwd_kernel,
        (tokens,),
        scale,
        logits.shape[1],
        logits.stride(0),
        *sizes,
        K=top_k,
        K_BLOCK=next_power_of_2(top_k),
        NUM_GROUPS=num_groups,
        TOP_K_GROUPS=top_k_groups,
        G_BLOCK=next_power_of_2(num_groups),
        NORMALIZE=norm_topk_prob,
        SIGMOID=scoring == "sigmoid",
        config=launch_config(logits.shape[1], logits.dtype),
        rows=(logits,),
    )


class _Replayed(NamedTuple):
    """The replay as bytes: every call has tensors of the same types, so that all run one binary."""

    ids: Tensor
    valid: Tensor
    sizes: tuple[int, int, int, int, int]  # replay, stride_ids, id_size, unused_bits, stride_valid of the kernel


def _replayed(ids: Tensor | None, valid: Tensor | None, *, nothing: Tensor) -> _Replayed:
    """nothing: a tensor to point to where there is nothing to read."""
    no_bytes = nothing.view(torch.uint8)
    if ids is None:
        return _Replayed(no_bytes, no_bytes, (0, 0, 0, 0, 0))
    size = ids.itemsize
    sizes = (ids.stride(0) * size, size, 64 - 8 * size if ids.dtype.is_signed else 0)
    ids = ids.view(torch.uint8)
    if valid is None:
        return _Replayed(ids, no_bytes, (1, *sizes, 0))
    return _Replayed(ids, valid.view(torch.uint8), (2, *sizes, valid.stride(0)))


def backward(
    router_logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    grad_weights: Tensor,
    norm_topk_prob: bool,
    scoring: str,
    scale: float,
    out: Tensor,
) -> None:
    """Writes d router_logits into `out`."""
    vec = 16 // router_logits.element_size()
    router_logits, grad = aligned(router_logits, vec), memory_for(out, vec)
    options = {"norm_topk_prob": norm_topk_prob, "scoring": scoring, "scale": scale}
    _backward(router_logits, weights, experts, grad_weights, grad, **options)
    if grad is not out:
        out.copy_(grad)


@prepared
def _backward(
    logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    grad_weights: Tensor,
    grad: Tensor,
    *,
    norm_topk_prob: bool,
    scoring: str,
    scale: float,
) -> Launch:
    tokens, top_k = experts.shape
    return over_rows(
        moe_routing_bwd_kernel,
        (tokens,),
        scale,
        logits.shape[1],
        logits.stride(0),
        grad.stride(0),
        K=top_k,
        K_BLOCK=next_power_of_2(top_k),
        NORMALIZE=norm_topk_prob,
        SIGMOID=scoring == "sigmoid",
        config=launch_config(logits.shape[1], logits.dtype),
        rows=(logits, grad),
    )


def launch_config(num_experts: int, dtype: torch.dtype) -> LaunchConfig:
    """One warp for up to 512 experts: the maxima that select experts then need no barrier. At most 16 logits a thread.

    No thread has less than one 128-bit access.
    """
    size, vec = next_power_of_2(num_experts), 16 // dtype.itemsize
    threads = max(size // 16, 64 if torch.version.hip else 32)
    return LaunchConfig(lanes=max(size // vec, threads), vec=vec, threads=threads)
