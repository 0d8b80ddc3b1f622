"""The sort of the pairs of token and expert by expert: a stable counting sort in one launch.

A program places the pairs of a few experts, in one segment of the pairs. The place of the first of them is the number
of pairs that come before it in the sorted order. The program counts these among all pairs. The counts are integers, so
their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.config import LaunchConfig
from ...common.triton.launch import Launch, prepared
from ...common.triton.sizes import cdiv
from .kernels import Rows

# experts of a program: their counts are fields of 16 bits in one int64
GROUP = tl.constexpr(4)
FIELD = tl.constexpr(16)
PROGRAMS = 128  # about one for each multiprocessor, since each of them reads all ids


@triton.jit
def load_ids(experts, o_n, N, E):
    """The expert of each pair; E for an id out of range, and beyond N."""
    b_e = tl.load(experts + o_n, mask=o_n < N, other=0).to(tl.int64)
    return tl.where((o_n < N) & (b_e >= 0) & (b_e < E), b_e, E).to(tl.int32)


@triton.jit(do_not_specialize=["N", "E", "segment"])
def experts_sort_kernel(experts, pairs, begins, N, E, segment, TILE: tl.constexpr):
    """pairs[begins[e] : begins[e + 1]] = the pairs of expert e, ascending. Ids out of range count as expert E."""
    first = tl.program_id(1) * segment
    o_g = tl.arange(0, GROUP)
    first_e = tl.program_id(0) * GROUP
    b_before = tl.zeros([GROUP, TILE], tl.int32)
    for start in range(0, N, TILE):
        b_e = load_ids(experts, start + tl.arange(0, TILE)[None, :], N, E)
        # pairs of the same expert come before the segment too
        b_before += (b_e < (first_e + o_g + (start < first))[:, None]).to(tl.int32)
    b_next = tl.minimum(tl.sum(b_before, 1), N)
    if first == 0:
        tl.store(begins + first_e + o_g, b_next.to(tl.int64), mask=first_e + o_g < E + 2)
    for start in range(first, tl.minimum(first + segment, N), TILE):
        o_n = start + tl.arange(0, TILE)[None, :]
        b_g = load_ids(experts, o_n, N, E) - first_e
        m_g = (b_g >= 0) & (b_g < GROUP)
        b_shift = tl.where(m_g, b_g * FIELD, 0)
        b_one = m_g.to(tl.int64) << b_shift
        b_rank = (tl.cumsum(b_one, 1) >> b_shift) & 0xFFFF
        b_place = tl.sum(tl.where(b_g == o_g[:, None], b_next[:, None], 0), 0)[None, :] + b_rank - 1
        tl.store(pairs + b_place, o_n.to(tl.int64), mask=m_g & (o_n < N))
        b_next += ((tl.sum(b_one) >> (o_g * FIELD)) & 0xFFFF).to(tl.int32)


def sorted_rows(experts: Tensor, num_experts: int) -> Rows:
    """The pairs of token and expert, sorted stably by expert. Pairs with an id out of range come last.

    experts: [T, K] integers, contiguous.
    """
    count = experts.numel()
    pairs = experts.new_empty(count, dtype=torch.int64)
    begins = experts.new_empty(num_experts + 2, dtype=torch.int64)
    _sort(experts, pairs, begins)
    return Rows(pairs, begins, experts.shape[1])


@prepared
def _sort(experts: Tensor, pairs: Tensor, begins: Tensor) -> Launch:
    count, num_experts = experts.numel(), begins.shape[0] - 2
    config = sort_config()
    groups = cdiv(num_experts + 2, GROUP.value)
    tiles = cdiv(cdiv(count, config.tile), max(PROGRAMS // groups, 1))
    segment = max(tiles, 1) * config.tile
    grid = (groups, max(cdiv(count, segment), 1))
    constants = {"TILE": config.tile, "num_warps": config.num_warps}
    return Launch(experts_sort_kernel, grid, (count, num_experts, segment), constants)


def sort_config() -> LaunchConfig:
    """Eight ids for each thread, whose loads are in flight together. A field of 16 bits can count a tile."""
    return LaunchConfig(lanes=2048, vec=2, threads=512)
