"""The softmax of a row of logits in tiles, and the gradient of the row.

Each lane keeps its own softmax over all tiles of a row, so that threads exchange values once per row rather than once
per tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import LN2, LOG2E, LOWEST, exponent, tanh
from .row_tiles import load_tile, store_tile, tile_offsets

IGNORE_INDEX = tl.constexpr(-100)
ELSEWHERE = tl.constexpr(-1)  # a token that counts, with an id in another shard of the vocabulary
# a logit that the sampler did not keep, before a softcap; the softcap would make -inf a finite number
NOT_KEPT = LOWEST


@triton.jit
def logits_of(b_x, i_tile, V, bias, softcap, LANES: tl.constexpr, VEC: tl.constexpr):
    """A tile of logits in float32: u = b_x + bias, then softcap * tanh(u / softcap). bias and softcap may be None.

    b_x: the loaded tile. The result is -inf beyond V, and with a softcap also where b_x is NOT_KEPT.
    """
    b_x = b_x.to(tl.float32)
    start = i_tile * (LANES * VEC)
    o_v = tile_offsets(LANES, VEC)
    m_kept = (o_v < V - start) & (b_x != NOT_KEPT)
    if bias is not None:
        b_x += tl.load(bias + start + o_v, mask=o_v < V - start, other=0.0)
    if softcap is not None:
        b_x = tl.where(m_kept, capped(b_x, softcap), -float("inf"))
    return b_x


@triton.jit
def logit_of_id(p_row, b_id, bias, softcap):
    """The logit of one token, as logits_of computes it."""
    logit = tl.load(p_row + b_id).to(tl.float32)
    if bias is not None:
        logit += tl.load(bias + b_id)
    if softcap is not None:
        logit = capped(logit, softcap)
    return logit


@triton.jit
def capped(b_x, softcap):
    return softcap * tanh(b_x * (1.0 / softcap))


@triton.jit
def softmax_step(b_x, b_shift, b_sum, b_weighted, c):
    """Add one tile to the softmax of each lane: the largest logit, sum of 2**y, sum of 2**y * y; y = (x - shift) * c.

    b_x is [LANES, VEC] float32; b_shift, b_sum and b_weighted are [LANES].
    The method is online softmax (Milakov and Gimelshein, arXiv 1805.02867).
    """
    b_max = tl.maximum(b_shift, tl.max(b_x, 1))
    b_y = exponent(b_x - b_max[:, None], c)
    b_e = tl.exp2(b_y)
    b_fall = exponent(b_shift - b_max, c)
    b_keep = tl.exp2(b_fall)
    b_weighted = (b_weighted + b_sum * b_fall) * b_keep + tl.sum(b_e * b_y, 1)
    return b_max, b_sum * b_keep + tl.sum(b_e, 1), b_weighted


@triton.jit
def softmax_merge(b_shift, b_sum, b_weighted, c):
    """Merge the softmaxes of the lanes into the softmax of the row: three scalars."""
    shift = tl.max(b_shift, 0)
    b_fall = exponent(b_shift - shift, c)
    b_keep = tl.exp2(b_fall)
    return shift, tl.sum(b_sum * b_keep, 0), tl.sum((b_weighted + b_sum * b_fall) * b_keep, 0)


@triton.jit
def sums_of_row(p_row, V, bias, softcap, c, LANES: tl.constexpr, VEC: tl.constexpr, ONE_TILE: tl.constexpr):
    """(shift, sum of 2**y, sum of 2**y * y, first tile in its stored dtype); y = (x - shift) * c.

    The row is read once, one tile ahead, from its end, so that a second reading finds a full tile in the cache.
    """
    b_shift = tl.full([LANES], LOWEST, tl.float32)
    b_sum = tl.zeros([LANES], tl.float32)
    b_weighted = tl.zeros([LANES], tl.float32)
    i_last = tl.cdiv(V, LANES * VEC) - 1
    b_x = load_tile(p_row, i_last, V, LANES, VEC)
    if not ONE_TILE:
        for i in range(i_last):
            b_next = load_tile(p_row, i_last - 1 - i, V, LANES, VEC)
            b_logits = logits_of(b_x, i_last - i, V, bias, softcap, LANES, VEC)
            b_shift, b_sum, b_weighted = softmax_step(b_logits, b_shift, b_sum, b_weighted, c)
            b_x = b_next
    b_logits = logits_of(b_x, 0, V, bias, softcap, LANES, VEC)
    b_shift, b_sum, b_weighted = softmax_step(b_logits, b_shift, b_sum, b_weighted, c)
    shift, row_sum, weighted = softmax_merge(b_shift, b_sum, b_weighted, c)
    return shift, row_sum, weighted, b_x


@triton.jit
def softmax_of_row(
    p_row, V, bias, softcap, temperature, LANES: tl.constexpr, VEC: tl.constexpr, ONE_TILE: tl.constexpr
):
    """(shift, log_sum, entropy, first tile in its stored dtype); log p_j = (x_j - shift) / temperature - log_sum."""
    c = LOG2E / temperature
    shift, row_sum, weighted, b_x = sums_of_row(p_row, V, bias, softcap, c, LANES, VEC, ONE_TILE)
    log_sum = tl.log(row_sum)
    return shift, log_sum, log_sum - LN2 * (weighted / row_sum), b_x


@triton.jit
def gradient_factors(log_prob_grad, entropy_grad, log_sum, entropy, temperature):
    """(k0, k1, at_id): the gradient of a row is 2**y (k0 + k1 y), plus at_id at the token; y = (x - shift) * c.

    The gradient is (c_t (onehot - p) - e_t p (log p + entropy)) / temperature, and exactly 0 where p is 1.
    """
    per_logit = 1.0 / temperature
    scale = tl.exp(-log_sum) * per_logit
    k0 = -(log_prob_grad + entropy_grad * (entropy - log_sum)) * scale
    return k0, -LN2 * entropy_grad * scale, log_prob_grad * per_logit


@triton.jit
def gradient_tile(b_x, i_tile, V, bias, softcap, b_id, shift, c, k0, k1, at_id, LANES: tl.constexpr, VEC: tl.constexpr):
    """The gradient of a tile with respect to b_x, the loaded tile. An id below 0 is at no element of the row."""
    b_x = logits_of(b_x, i_tile, V, bias, softcap, LANES, VEC)
    b_y = exponent(b_x - shift, c)
    is_id = tile_offsets(LANES, VEC) == (b_id - i_tile * (LANES * VEC)).to(tl.int32)
    b_grad = tl.exp2(b_y) * (k0 + k1 * b_y) + tl.where(is_id, at_id, 0.0)
    if softcap is not None:
        b_part = b_x * (1.0 / softcap)
        b_grad *= tl.maximum(1 - b_part * b_part, 0.0, propagate_nan=tl.PropagateNan.ALL)  # 0 for a logit of -inf too
    return b_grad


@triton.jit
def store_gradient_row(
    b_x,
    p_row,
    p_out,
    V,
    bias,
    softcap,
    b_id,
    shift,
    c,
    k0,
    k1,
    at_id,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """Write gradient_tile for every tile of a row, whose first tile is b_x, reading one tile ahead.

    p_out may be p_row: the gradient then overwrites the logits. If the gradient is the narrower dtype, its tile i
    overwrites tiles of logits up to i, which this warp has read. The barrier makes sure that the other warps have too.
    """
    i_last = tl.cdiv(V, LANES * VEC) - 1
    if not ONE_TILE:
        for i_tile in range(i_last):
            b_next = load_tile(p_row, i_tile + 1, V, LANES, VEC, EVICT="evict_first")
            b_out = gradient_tile(b_x, i_tile, V, bias, softcap, b_id, shift, c, k0, k1, at_id, LANES, VEC)
            barrier_if_narrower(p_out, p_row)
            store_tile(p_out, b_out, i_tile, V, LANES, VEC, EVICT="evict_first")
            b_x = b_next
    b_last = gradient_tile(b_x, i_last, V, bias, softcap, b_id, shift, c, k0, k1, at_id, LANES, VEC)
    barrier_if_narrower(p_out, p_row)
    store_tile(p_out, b_last, i_last, V, LANES, VEC, EVICT="evict_first")


@triton.jit
def barrier_if_narrower(p_out, p_row):
    if p_out.dtype.element_ty != p_row.dtype.element_ty:
        tl.debug_barrier()
