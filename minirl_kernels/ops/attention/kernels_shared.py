"""Shared parts of the attention kernels: the blocks of the spans, the loads of their rows, and the launch.

A program computes a block of stacked rows, or a block of keys for the gradients by k and v. A stacked row is one query
in one of the query heads that share a key head. The blocks of a span start at its own first row and first key, so that
they do not depend on the spans before it.

Slot 0 is the rows before the first span. Slot i is span i - 1, and the rows after it up to the next span. A program
searches its slot in the spans themselves. It writes 0 to the rows of the slot that are outside the span.

Names: as in common/triton/row_tiles.py; M rows and N keys of a block; D is the head size of q and k, DV of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton import architecture
from ...common.triton.config import Threads, is_whole
from ...common.triton.launch import Launch
from ...common.triton.numbers import dot
from ...common.triton.row_tiles import multiple
from ...common.triton.sizes import next_power_of_2

# not specialised, so that there is one binary per dtype, D, DV, group and ALIGN
STRIDES = [f"stride_{name}{axis}" for name in "qkv" for axis in "bhl"]
SIZES = ["num_spans", "batches", "queries_of_batch", "keys_of_batch", *STRIDES]
SPANS = ["spans", "key_offsets"]  # read one number at a time, at any address
QUERIES = tl.constexpr(1)  # the column of spans with the first query; the number of queries follows
KEYS = tl.constexpr(3)


@triton.jit
def begin_of(spans, i_span, num_spans, rows_of_batch, batches, COLUMN: tl.constexpr, PACKED: tl.constexpr):
    """The first row of a span, counted through all batch entries; 0 for span -1, the number of rows for num_spans."""
    m_span = (i_span >= 0) & (i_span < num_spans)
    if PACKED:
        begin = tl.load(spans + i_span, mask=m_span, other=0).to(tl.int64)
    else:
        batch = tl.load(spans + 5 * i_span, mask=m_span, other=0)
        begin = batch * rows_of_batch + tl.load(spans + 5 * i_span + COLUMN, mask=m_span, other=0)
    return tl.where(i_span < num_spans, begin, rows_of_batch * batches)


@triton.jit
def rows_of_span(spans, i_span, COLUMN: tl.constexpr, PACKED: tl.constexpr):
    """(batch entry, first row, number of rows) of a span; three times 0 for span -1."""
    m_span = i_span >= 0
    if PACKED:
        batch = tl.full([], 0, tl.int64)
        first = tl.load(spans + i_span, mask=m_span, other=0).to(tl.int64)
        count = tl.load(spans + i_span + 1, mask=m_span, other=0).to(tl.int64) - first
    else:
        p_span = spans + 5 * i_span
        batch = tl.load(p_span, mask=m_span, other=0)
        first = tl.load(p_span + COLUMN, mask=m_span, other=0)
        count = tl.load(p_span + COLUMN + 1, mask=m_span, other=0)
    return batch, first, count


@triton.jit
def block_of(
    program,
    spans,
    num_spans,
    rows_of_batch,
    batches,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMN: tl.constexpr,
    PACKED: tl.constexpr,
):
    """(span, block, number of rows): the block of a program, within the rows from its span to the next one.

    The blocks of slot i begin at program i + (rows before the slot) // BLOCK, which leaves enough of them for the slot
    before. The span is -1 in slot 0. A block may begin after the last row.
    """
    low = tl.full([], 0, tl.int64)
    high = low + num_spans
    while low < high:
        middle = (low + high + 1) // 2
        begin = begin_of(spans, middle - 1, num_spans, rows_of_batch, batches, COLUMN, PACKED) * GROUP // BLOCK
        is_behind = begin + middle > program
        high = tl.where(is_behind, middle - 1, high)
        low = tl.where(is_behind, low, middle)
    begin = begin_of(spans, low - 1, num_spans, rows_of_batch, batches, COLUMN, PACKED)
    end = begin_of(spans, low, num_spans, rows_of_batch, batches, COLUMN, PACKED)
    i_block = program - begin * GROUP // BLOCK - low
    return low - 1, i_block.to(tl.int32), ((end - begin) * GROUP).to(tl.int32)


@triton.jit
def is_sound(spans, i_span, num_spans, rows_of_batch, batches, COLUMN: tl.constexpr, PACKED: tl.constexpr):
    """Whether a span is inside its batch entry, and its rows before those of the next span; if packed, right before."""
    batch, first, count = rows_of_span(spans, i_span, COLUMN, PACKED)
    begin = begin_of(spans, i_span, num_spans, rows_of_batch, batches, COLUMN, PACKED)
    end = begin_of(spans, i_span + 1, num_spans, rows_of_batch, batches, COLUMN, PACKED)
    sound = (batch >= 0) & (batch < batches) & (first >= 0) & (first <= rows_of_batch)
    sound &= (count >= 0) & (count <= rows_of_batch - first) & (end <= rows_of_batch * batches)
    return sound & (begin + count == end if PACKED else begin + count <= end)


@triton.jit
def assert_sound(spans, key_offsets, i_span, num_spans, batches, queries_of_batch, keys_of_batch):
    """An assertion on the device: the host does not wait, and no program reads out of bounds."""
    PACKED: tl.constexpr = key_offsets is not None
    of_keys = key_offsets if PACKED else spans
    sound = is_sound(spans, i_span, num_spans, queries_of_batch, batches, QUERIES, PACKED)
    sound &= is_sound(of_keys, i_span, num_spans, keys_of_batch, batches, KEYS, PACKED)
    if PACKED:
        tl.device_assert(sound, "cu_seqlens_q and cu_seqlens_k must start at 0, never fall, and end at the last row")
    else:
        tl.device_assert(sound, "spans must be inside their batch entries, and in the order of their rows")


@triton.jit
def span_at(spans, key_offsets, i_span):
    """(batch entry, first query, queries, first key, keys); five times 0 for span -1."""
    PACKED: tl.constexpr = key_offsets is not None
    batch, first_query, queries = rows_of_span(spans, i_span, QUERIES, PACKED)
    _, first_key, keys = rows_of_span(key_offsets if PACKED else spans, i_span, KEYS, PACKED)
    return batch, first_query, queries.to(tl.int32), first_key, keys.to(tl.int32)


@triton.jit
def rows_in(batch, first, o_r, head, GROUP: tl.constexpr, stride_b, stride_h, stride_l):
    """Offset in elements of each stacked row of the span that begins at query `first`.

    Stacked row o_r is query o_r // GROUP in head o_r % GROUP of the GROUP query heads that share a key head.
    """
    return batch * stride_b + (first + o_r // GROUP) * stride_l + (head * GROUP + o_r % GROUP) * stride_h


@triton.jit
def first_of_head(x, batch, head, first, stride_b, stride_h, stride_l, ALIGN: tl.constexpr):
    """(the address of row `first` of a head in a batch entry, the stride of rows)."""
    stride_l = multiple(stride_l, ALIGN)
    return x + batch * multiple(stride_b, ALIGN) + head * multiple(stride_h, ALIGN) + first * stride_l, stride_l


@triton.jit
def seen_by(o_r, queries, keys, GROUP: tl.constexpr, CAUSAL: tl.constexpr):
    """The number of keys that each row sees."""
    b_seen = keys - queries + o_r // GROUP + 1 if CAUSAL else keys + 0 * o_r
    return tl.maximum(b_seen, 0)


@triton.jit
def range_of_seen(b_seen, m_r, keys):
    """(the number of keys that any row sees, the number that all rows see)."""
    most = tl.max(tl.max(tl.where(m_r, b_seen, 0), 0), 0)
    least = tl.min(tl.min(tl.where(m_r, b_seen, keys), 0), 0)
    return most, tl.minimum(least, most)


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


@triton.jit
def add_products(b_a, b_b, b_sum, b_keep):
    """b_sum b_keep + b_a b_b; a b_keep of None counts as 1.

    In float32 the products are summed apart, so that a long sum is no chain of all its terms.
    """
    if b_a.dtype == tl.float32:
        b_chain = dot(b_a, b_b, tl.zeros_like(b_sum))
        # without fma the compiler would continue the chain of b_sum
        if b_keep is None:
            b_sum = tl.fma(b_chain, 1.0, b_sum)
        else:
            b_sum = tl.fma(b_sum, tl.broadcast_to(b_keep, b_sum.shape), b_chain)
    elif b_keep is None:
        b_sum = dot(b_a, b_b, b_sum)
    else:
        b_sum = dot(b_a, b_b, b_sum * b_keep)
    return b_sum


class Operands(NamedTuple):
    """The first arguments of all kernels.

    spans: [N, 5]; or [N + 1], the offsets of the queries, with key_offsets [N + 1].
    """

    q: Tensor  # [B, Hq, Lq, D]
    k: Tensor  # [B, Hkv, Lk, D]
    v: Tensor  # [B, Hkv, Lk, DV]
    spans: Tensor
    key_offsets: Tensor | None

    @property
    def num_spans(self) -> int:
        return len(self.spans) - (self.key_offsets is not None)

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def rows(self) -> int:
        """Stacked rows of a key head, over all batch entries."""
        return self.q.shape[0] * self.q.shape[2] * self.group

    @property
    def keys(self) -> int:
        """Keys of a key head, over all batch entries."""
        return self.k.shape[0] * self.k.shape[2]

    @property
    def kind(self) -> tuple[int, torch.dtype, str]:
        """The widest head, the dtype and the GPU, on which the block sizes depend."""
        return max(self.q.shape[3], self.v.shape[3]), self.q.dtype, architecture.of(self.q.device)


def access(q: Tensor, v: Tensor) -> int:
    """The elements of one access of 128 bits, if the rows of q and v are a whole number of them; else 1."""
    vec = 16 // q.element_size()
    return 1 if q.shape[3] % vec or v.shape[3] % vec else vec


def over_blocks(
    kernel: Any, operands: Operands, count: int, block: int, *floats: float, causal: bool, config: TileConfig, **options
) -> Launch:
    """The launch of a kernel over the blocks of `count` rows or keys, for each key head.

    floats: the values that the kernel takes before the sizes.
    """
    q, k, v, _, _ = operands
    if count >= 2**31:
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: a head of k must have fewer than 2**31 rows, and "
            "fewer than 2**31 rows of q"
        )
    blocks = count // block + operands.num_spans + 1 if count else 0
    sizes = operands.num_spans, q.shape[0], q.shape[2], k.shape[2]
    constants = {
        "CAUSAL": causal,
        "GROUP": operands.group,
        "D": q.shape[3],
        "DV": v.shape[3],
        "BLOCK_M": config.rows,
        "BLOCK_N": config.keys,
        "BLOCK_D": max(next_power_of_2(q.shape[3]), 16),
        "BLOCK_DV": max(next_power_of_2(v.shape[3]), 16),
        "DEPTH": config.depth,
        "ALIGN": access(q, v),
        "num_warps": config.num_warps,
        "num_stages": config.stages,
    }
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    return Launch(kernel, (blocks, k.shape[1]), (*floats, *sizes, *strides), {**constants, **options})


@dataclass(frozen=True)
class TileConfig(Threads):
    """The block sizes of a span: a function of the head size, dtype and GPU alone, so that rows are batch-invariant.

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


def fits(size: int, dtype: torch.dtype) -> bool:
    """Whether whole tiles of a 16-bit head fit into the registers.

    Rows must also allow 128-bit accesses: else each element takes an address of its own.
    """
    return size <= 128 and is_whole(size, dtype)


def multiplies_from_shared_memory(arch: str) -> bool:
    """Whether tensor cores read both operands from shared memory: tiles can be larger, with fewer threads.

    arch: as architecture.of has it; Triton's interpreter has the tiles of these GPUs.
    """
    return arch in ("sm_90", "sm_100", "sm_103", "")


def stages() -> int:
    """AMD GPUs have 64 KiB of shared memory, a third of NVIDIA's."""
    return 1 if torch.version.hip else 2
