"""kept_logits on the GPU: one program per row and tile. It writes the dropped logits, and reads no logits."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.config import LaunchConfig, is_whole, make_config, sizes_of
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.row_tiles import row_offset, row_pointer, store_tile, tile_offsets, unspecialized
from ...common.triton.sizes import cdiv
from .op import KeptRows


@triton.jit
def first_at_least(ids, i_begin, i_end, bound):
    """The first index in the ascending ids[i_begin:i_end] with an id of at least `bound`, or i_end."""
    while i_begin < i_end:
        i_middle = i_begin + (i_end - i_begin) // 2
        if tl.load(ids + i_middle) < bound:
            i_begin = i_middle + 1
        else:
            i_end = i_middle
    return i_begin


@unspecialized()
def kept_logits_kernel(
    logits,
    ids,
    begin,
    end,
    fill,
    L,
    V,
    stride_b,
    stride_l,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    V = V // ALIGN * ALIGN
    i_tile = tl.program_id(1)
    i_begin = tl.load(begin + i_t)
    i_end = tl.load(end + i_t)
    if i_begin == i_end:
        return
    p_row = row_pointer(logits, row_offset(i_t, L, stride_b, stride_l, ALIGN), ALIGN)
    b_dropped = tl.full([LANES, VEC], fill, tl.float32)
    start = i_tile * (LANES * VEC)
    i_first = first_at_least(ids, i_begin, i_end, start)
    i_last = first_at_least(ids, i_first, i_end, start + LANES * VEC)
    if i_first == i_last:
        store_tile(p_row, b_dropped, i_tile, V, LANES, VEC)
        return
    o_v = tile_offsets(LANES, VEC)
    m_dropped = o_v < V - start
    for i in range(i_first, i_last):
        m_dropped = m_dropped & (o_v != tl.load(ids + i) - start)
    tl.store(p_row + start + o_v, b_dropped.to(p_row.dtype.element_ty), mask=m_dropped)


def keep_(logits: Tensor, kept: KeptRows, fill: float = -math.inf) -> None:
    """Write `fill` where a token is not in the set of its row. logits: [B, L, V] or [T, V], any dtype."""
    _keep(logits, kept.ids, kept.begin, kept.end, fill=fill)


@prepared
def _keep(logits: Tensor, ids: Tensor, begin: Tensor, end: Tensor, *, fill: float) -> Launch:
    config = launch_config(logits.shape[-1], logits.dtype)
    grid = logits.shape[:-1].numel(), cdiv(logits.shape[-1], config.tile)
    return over_rows(kept_logits_kernel, grid, fill, *sizes_of(logits), config=config, rows=(logits,))


def launch_config(vocab_size: int, dtype: torch.dtype) -> LaunchConfig:
    """The kernel has no sums, so a program is one small tile, and a row has many. Rows that do not allow 128-bit
    accesses need more registers per logit, so a thread takes half as many."""
    per_thread = (32 if is_whole(vocab_size, dtype) else 16) // dtype.itemsize
    return make_config(vocab_size, dtype, threads=256, per_thread=per_thread)
