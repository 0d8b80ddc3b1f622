"""A row in tiles: its address, its loads and its stores.

A tile is [LANES, VEC]: VEC neighbours make one 128-bit access.

Names: p_ pointer, i_ index, o_ offsets, m_ mask, b_ values of a block; T tokens, L tokens per batch entry, V logits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import round_to

# one binary per dtype and alignment: ALIGN says all that a kernel needs to know of these
SIZES = ["L", "V", "stride_b", "stride_l", "out_stride_b", "out_stride_l"]
# triton 3.6 does not compile a plain string as the default of a parameter
NO_EVICTION_HINT = tl.constexpr("")


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
def load_tile(p_row, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr = NO_EVICTION_HINT):
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
def store_tile(p_row, b_x, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr = NO_EVICTION_HINT):
    start = i_tile * (LANES * VEC)
    o_v = tile_offsets(LANES, VEC)
    b_x = round_to(b_x, p_row.dtype.element_ty)
    tl.store(p_row + start + o_v, b_x, mask=o_v < V - start, eviction_policy=EVICT)


@triton.jit
def fill_row(p_row, value, V, LANES: tl.constexpr, VEC: tl.constexpr):
    b_x = tl.full([LANES, VEC], value, tl.float32)
    for i_tile in range(tl.cdiv(V, LANES * VEC)):
        store_tile(p_row, b_x, i_tile, V, LANES, VEC)
