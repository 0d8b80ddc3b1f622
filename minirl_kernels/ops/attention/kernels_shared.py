"""Shared parts of the attention kernels: the blocks of a span, the loads of their rows, and the launch.

A program computes a block of stacked rows, or a block of keys for the gradients by k and v. A stacked row is one query
in one of the query heads that share a key head. The blocks of a span start at its own first row and first key, so that
they do not depend on the spans before it.

Names: as in common/triton/row_tiles.py; M rows and N keys of a block; D is the head size of q and k, DV of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.numbers import dot

# not specialised, so that there is one binary per dtype, D, DV, group and ALIGN
STRIDES = [f"stride_{name}{axis}" for name in "qkv" for axis in "bhl"]
SIZES = ["num_spans", "queries_of_batch", "keys_of_batch", *STRIDES]


@triton.jit
def block_of(block_spans, begins, num_spans):
    """(span, block within the span) of this program by axis 0; a program without work gets the span num_spans."""
    i_span = tl.load(block_spans + tl.program_id(0))
    begin = tl.load(begins + i_span, mask=i_span < num_spans, other=0)
    return i_span, tl.program_id(0) - begin


@triton.jit
def span_at(spans, i_span):
    """(batch entry, first query, queries, first key, keys)"""
    p_span = spans + i_span * 5
    return tl.load(p_span), tl.load(p_span + 1), tl.load(p_span + 2), tl.load(p_span + 3), tl.load(p_span + 4)


@triton.jit
def rows_in(batch, first, o_r, head, GROUP: tl.constexpr, stride_b, stride_h, stride_l):
    """Offset in elements of each stacked row of the span that begins at query `first`.

    Stacked row o_r is query o_r // GROUP in head o_r % GROUP of the GROUP query heads that share a key head.
    """
    return batch * stride_b + (first + o_r // GROUP) * stride_l + (head * GROUP + o_r % GROUP) * stride_h


@triton.jit
def seen_by(o_r, queries, keys, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """The number of keys that each row sees."""
    b_seen = keys - queries + o_r // GROUP + 1 if CAUSAL else keys + 0 * o_r
    return tl.maximum(b_seen, 0)


@triton.jit
def load_rows(p_rows, m_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, BLOCK)[None, :]
    return tl.load(p_rows + o_d, mask=m_rows & (o_d < SIZE), other=0.0)


@triton.jit
def load_unless_split(p_rows, m_rows, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """The rows for row_products, or 0.0 where DEPTH < BLOCK: row_products then loads parts of the rows itself."""
    return 0.0 if DEPTH < BLOCK else load_rows(p_rows, m_rows, SIZE, BLOCK)


@triton.jit
def row_products(
    b_a,
    b_b,
    p_a,
    p_b,
    m_a,
    m_b,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[A_ROWS, B_ROWS]: the products of rows at p_a, m_a [A_ROWS, 1] and p_b, m_b [B_ROWS, 1], DEPTH terms at once."""
    b_sum = tl.zeros([A_ROWS, B_ROWS], tl.float32)
    if DEPTH < BLOCK:
        for i_d in range(tl.cdiv(SIZE, DEPTH)):
            o_d = i_d * DEPTH + tl.arange(0, DEPTH)[None, :]
            b_left = tl.load(p_a + o_d, mask=m_a & (o_d < SIZE), other=0.0)
            b_right = tl.load(p_b + o_d, mask=m_b & (o_d < SIZE), other=0.0)
            b_sum = dot(b_left, tl.trans(b_right), b_sum)
    else:
        b_sum = dot(b_a, tl.trans(b_b), b_sum)
    return b_sum


class Blocks(NamedTuple):
    """The blocks of the rows, or of the keys, of all N spans. The first block of a span starts at its first row."""

    block_spans: Tensor  # [number of blocks or more] int64: the span of each block; N for the surplus
    begins: Tensor  # [N] int64: the first block of each span

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.block_spans, self.begins


def query_blocks(q: Tensor, k: Tensor, spans: Tensor, config: TileConfig) -> Blocks:
    group = q.shape[1] // k.shape[1]
    return _blocks(spans[:, 2] * group, q.shape[0] * q.shape[2] * group, config.rows)


def key_blocks(k: Tensor, spans: Tensor, config: TileConfig) -> Blocks:
    return _blocks(spans[:, 4], k.shape[0] * k.shape[2], config.keys)


def _blocks(counts: Tensor, most: int, size: int) -> Blocks:
    """most: an upper bound of the sum of the counts, known to the host without waiting for the device."""
    blocks = (counts + size - 1) // size
    ends = blocks.cumsum(0)
    places = torch.arange(most // size + len(counts) if most else 0, device=counts.device)
    return Blocks(torch.searchsorted(ends, places, right=True), ends - blocks)


def launch(
    kernel,
    blocks: Blocks,
    tensors: tuple,
    floats: tuple[float, ...],
    sizes: tuple[int, ...],
    operands: tuple[Tensor, Tensor, Tensor],
    causal: bool,
    config: TileConfig,
) -> None:
    q, k, v = operands
    grid = (len(blocks.block_spans), k.shape[1])
    if 0 in grid:
        return
    strides = [stride for x in operands for stride in x.stride()[:3]]
    vec = 16 // q.element_size()
    with torch.cuda.device_of(q):
        kernel[grid](
            *tensors,
            *floats,
            len(blocks.begins),
            *sizes,
            *strides,
            CAUSAL=causal,
            GROUP=q.shape[1] // k.shape[1],
            D=q.shape[3],
            DV=v.shape[3],
            BLOCK_M=config.rows,
            BLOCK_N=config.keys,
            BLOCK_D=max(triton.next_power_of_2(q.shape[3]), 16),
            BLOCK_DV=max(triton.next_power_of_2(v.shape[3]), 16),
            DEPTH=config.depth,
            # 128-bit accesses need every size and stride to be a multiple of 128 bits
            ALIGN=vec if all(n % vec == 0 for n in (*strides, q.shape[3], v.shape[3])) else 1,
            num_warps=config.num_warps,
            num_stages=config.stages,
        )


@dataclass(frozen=True)
class TileConfig:
    """The block sizes of a span. They depend on the head size and the dtype alone, so that rows are batch-invariant.

    rows, keys: of a tile of scores.
    depth: number of terms of a score in one step.
    threads: of a program.
    stages: number of blocks in flight.
    """

    rows: int
    keys: int
    depth: int
    threads: int
    stages: int

    @property
    def tile(self) -> int:
        return self.rows * self.keys

    @property
    def num_warps(self) -> int:
        return self.threads // (64 if torch.version.hip else 32)


def fits(size: int, dtype: torch.dtype) -> bool:
    """Whether whole tiles of a 16-bit head fit into the registers.

    Rows must also allow 128-bit accesses: else each element takes an address of its own.
    """
    return size <= 128 and size * dtype.itemsize % 16 == 0


def stages() -> int:
    """AMD GPUs have 64 KiB of shared memory, a third of NVIDIA's."""
    return 1 if torch.version.hip else 2
