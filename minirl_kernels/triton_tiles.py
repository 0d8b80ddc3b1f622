"""What several Triton kernels share: a row in tiles, and the softmax that runs over them.

A tile is [LANES, VEC]: VEC neighbours make one 128-bit access, and each lane keeps a softmax of its own over all the
tiles of a row, so that threads meet once at the end of a row rather than once per tile.

Names: p_ pointer, i_ index, o_ offsets, m_ mask, b_ values of a block; T tokens, L tokens per batch entry, V logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
IGNORE_INDEX = tl.constexpr(-100)
ELSEWHERE = tl.constexpr(-1)  # the id counts, and is in another shard of the vocabulary
# the maximum of nothing: finite, so that a row that begins with -inf subtracts no infinities
LOWEST = tl.constexpr(-3.4028234663852886e38)
# a logit that the sampler did not keep, where a softcap is still to come: that would make a number of -inf
NOT_KEPT = LOWEST
# 2**-160 is 0 in float32, and 0 * -160 is 0 where 0 * -inf would be NaN
LOWEST_EXPONENT = tl.constexpr(-160.0)
# one binary per dtype and alignment: ALIGN says all that a kernel needs to know of these
SIZES = ["L", "V", "stride_b", "stride_l", "out_stride_b", "out_stride_l"]
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def row_offset(i_t, L, stride_b, stride_l, ALIGN: tl.constexpr):
    """Elements from the start of [B, L, V] to row i_t of its B * L, in 64 bits."""
    return (i_t // L) * multiple(stride_b, ALIGN) + (i_t % L) * multiple(stride_l, ALIGN)


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """n, which the launcher knows to be a multiple of ALIGN: said so that the compiler knows it too."""
    return n // ALIGN * ALIGN


@triton.jit
def tile_offsets(LANES: tl.constexpr, VEC: tl.constexpr):
    """Within the tile: a thread's own are then constants apart, which cost neither registers nor instructions."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_tile(p_row, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr = ""):
    """A tile as it is stored, -inf beyond V: packed values wait for their turn in half the registers."""
    start = i_tile * (LANES * VEC)
    o_v = tile_offsets(LANES, VEC)
    return tl.load(p_row + start + o_v, mask=o_v < V - start, other=-float("inf"), eviction_policy=EVICT)


@triton.jit
def load_terms(p_row, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """A tile in float32, 0 beyond V: for sums."""
    start = i_tile * (LANES * VEC)
    o_v = tile_offsets(LANES, VEC)
    return tl.load(p_row + start + o_v, mask=o_v < V - start, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p_row, b_x, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr = ""):
    start = i_tile * (LANES * VEC)
    o_v = tile_offsets(LANES, VEC)
    b_x = round_to(b_x, p_row.dtype.element_ty)
    tl.store(p_row + start + o_v, b_x, mask=o_v < V - start, eviction_policy=EVICT)


@triton.jit
def fill_row(p_row, value, V, LANES: tl.constexpr, VEC: tl.constexpr):
    b_x = tl.full([LANES, VEC], value, tl.float32)
    for i_tile in range(tl.cdiv(V, LANES * VEC)):
        store_tile(p_row, b_x, i_tile, V, LANES, VEC)


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """float32 to the nearest value of `dtype`, ties to even. The interpreter truncates to bfloat16 instead."""
    if INTERPRETING and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)


@triton.jit
def dot(b_a, b_b, b_sum):
    """b_sum + b_a b_b, in float32 without TF32. The interpreter multiplies the bits of bfloat16 instead."""
    if INTERPRETING:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def tanh(b_x):
    """By an odd polynomial of least squares below 0.64 (relative error 6e-9), by 1 - 2 / (e^2|x| + 1) above."""
    b_z = b_x * b_x
    b_p = b_z * -5.59025e-3 + 2.053771e-2
    b_p = b_z * b_p - 5.37091e-2
    b_p = b_z * b_p + 0.13331081
    b_p = b_z * b_p - 0.33333269
    b_e = tl.exp2(exponent(tl.abs(b_x), -2 * LOG2E))
    b_large = (1 - b_e) / (1 + b_e)
    return tl.where(tl.abs(b_x) < 0.64, b_x + b_x * b_z * b_p, tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def logits_of(b_x, i_tile, V, bias, softcap, LANES: tl.constexpr, VEC: tl.constexpr):
    """A tile of logits in float32 from what was loaded: u = b_x + bias, and softcap * tanh(u / softcap); either may
    be None, which costs nothing. -inf beyond V, and of NOT_KEPT where there is a softcap."""
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
    """The same for the logit of one token."""
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
def exponent(b_x, c):
    """b_x * c for exp2, never below LOWEST_EXPONENT; NaN stays NaN."""
    return tl.maximum(b_x * c, LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def softmax_step(b_x, b_shift, b_sum, b_weighted, c):
    """One more tile in each lane's softmax: the largest logit, sum of 2**y, sum of 2**y * y; y = (x - shift) * c.

    b_x [LANES, VEC] float32; b_shift, b_sum, b_weighted [LANES]. Online softmax of Milakov and Gimelshein (arXiv
    1805.02867).
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
    """The lanes' softmaxes as the row's: three scalars."""
    shift = tl.max(b_shift, 0)
    b_fall = exponent(b_shift - shift, c)
    b_keep = tl.exp2(b_fall)
    return shift, tl.sum(b_sum * b_keep, 0), tl.sum((b_weighted + b_sum * b_fall) * b_keep, 0)


@triton.jit
def sums_of_row(p_row, V, bias, softcap, c, LANES: tl.constexpr, VEC: tl.constexpr, ONE_TILE: tl.constexpr):
    """(shift, sum of 2**y, sum of 2**y * y, first tile as it is stored); y = (x - shift) * c.

    The row is read once, a tile ahead, from its end: so the tile that is left on chip for a second reading is full.
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
    """(shift, log_sum, entropy, first tile as it is stored): log p_j = (x_j - shift) / temperature - log_sum."""
    c = LOG2E / temperature
    shift, row_sum, weighted, b_x = sums_of_row(p_row, V, bias, softcap, c, LANES, VEC, ONE_TILE)
    log_sum = tl.log(row_sum)
    return shift, log_sum, log_sum - LN2 * (weighted / row_sum), b_x


@triton.jit
def gradient_factors(log_prob_grad, entropy_grad, log_sum, entropy, temperature):
    """(k0, k1, at_id) such that a row's gradient is 2**y (k0 + k1 y), and at_id more at its token; y as above.

    That is (c_t (onehot - p) - e_t p (log p + entropy)) / temperature, exactly 0 where p is 1.
    """
    per_logit = 1.0 / temperature
    scale = tl.exp(-log_sum) * per_logit
    k0 = -(log_prob_grad + entropy_grad * (entropy - log_sum)) * scale
    return k0, -LN2 * entropy_grad * scale, log_prob_grad * per_logit


@triton.jit
def gradient_tile(b_x, i_tile, V, bias, softcap, b_id, shift, c, k0, k1, at_id, LANES: tl.constexpr, VEC: tl.constexpr):
    """By what was loaded, where logits_of makes the logits of it. No token is at an id below 0."""
    b_x = logits_of(b_x, i_tile, V, bias, softcap, LANES, VEC)
    b_y = exponent(b_x - shift, c)
    is_id = tile_offsets(LANES, VEC) == (b_id - i_tile * (LANES * VEC)).to(tl.int32)
    b_grad = tl.exp2(b_y) * (k0 + k1 * b_y) + tl.where(is_id, at_id, 0.0)
    if softcap is not None:
        b_part = b_x * (1.0 / softcap)
        b_grad *= tl.maximum(1 - b_part * b_part, 0.0, propagate_nan=tl.PropagateNan.ALL)  # of -inf too
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
    """gradient_tile over a row whose first tile is b_x, a tile ahead. p_out may be p_row; then the rest of the row is
    still to be read.

    A gradient narrower than the logits has its tile i in the memory of their tiles up to i: walking upwards, these have
    been read. By this warp; the barrier is for those that have not come so far, and keeps all within a tile.
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


@dataclass(frozen=True)
class LaunchConfig:
    """How one row is cut, from V and dtype alone, so that a token's bits do not depend on its neighbours.

    lanes x vec: elements of a tile; threads: of a program.
    """

    lanes: int
    vec: int
    threads: int

    @property
    def tile(self) -> int:
        return self.lanes * self.vec

    @property
    def num_warps(self) -> int:
        return max(self.threads // (64 if torch.version.hip else 32), 1)


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut, never by its number of rows, so that a row's bits do not depend on which others there are.

    rows x columns: of a program's tile; depth: what it sums over at once; stages: how many of those are in flight.
    """

    rows: int
    columns: int
    depth: int
    threads: int
    stages: int

    @property
    def tile(self) -> int:
        return self.rows * self.columns

    @property
    def num_warps(self) -> int:
        return self.threads // (64 if torch.version.hip else 32)


def make_config(vocab_size: int, dtype: torch.dtype, *, threads: int, per_thread: int) -> LaunchConfig:
    """A tile of `per_thread` logits for each of `threads` threads; for a short row fewer, down to AMD's warp.

    dtype: the narrowest of what is loaded and stored.
    """
    wanted = triton.next_power_of_2(vocab_size) // per_thread
    threads = min(max(wanted, 64), threads)
    vec = 16 // dtype.itemsize
    return LaunchConfig(lanes=threads * per_thread // vec, vec=vec, threads=threads)


def is_whole(vocab_size: int, dtype: torch.dtype) -> bool:
    """Whether a row is a whole number of 128-bit accesses."""
    return vocab_size * dtype.itemsize % 16 == 0


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """(L, stride of B, stride of L) of [B, L, V] or [T, V], which is one batch entry."""
    return x.shape[-2], x.stride(0) if x.dim() == 3 else 0, x.stride(-2)


def launch(kernel, grid: tuple[int, ...], *args, config: LaunchConfig, rows: tuple[Tensor, ...], **constants) -> None:
    """Run `kernel` over tiles of `rows` (tensors of one shape [..., V]) on their device."""
    if 0 in grid:
        return
    # accesses can be 128 bits where every row begins and ends at a multiple of them
    aligned = all(n % config.vec == 0 for x in rows for n in (x.shape[-1], *row_strides(x)[1:]))
    with torch.cuda.device_of(rows[0]):
        kernel[grid](
            *args,
            **constants,
            LANES=config.lanes,
            VEC=config.vec,
            ALIGN=config.vec if aligned else 1,
            num_warps=config.num_warps,
        )
