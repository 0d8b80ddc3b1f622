"""The tiles of a row: addresses, loads and stores.

A tile is [LANES, VEC]. VEC neighbouring elements make one 128-bit access.

Names: p_ pointer, i_ index, o_ offsets, m_ mask, b_ block of values; T tokens, L tokens per batch entry, V logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import triton
import triton.language as tl

from .numbers import round_to

# not specialised, so that there is one binary per dtype and ALIGN
SIZES = ["L", "V", "stride_b", "stride_l", "out_stride_b", "out_stride_l"]
# triton 3.6 does not compile a plain string as the default of a parameter
NO_EVICTION_HINT = tl.constexpr("")


def unspecialized(*, aligned: Iterable[str] = ()) -> Callable:
    """triton.jit with one binary for each choice of dtypes and constants, whatever the values and addresses are.

    aligned: the pointers that alignment.aligned_vector made. The binary may rely on their alignment.
    """

    def jit(function: Callable):
        parameters = inspect.signature(function).parameters.values()
        arguments = [parameter.name for parameter in parameters if parameter.annotation != "tl.constexpr"]
        return triton.jit(function, do_not_specialize=[name for name in arguments if name not in aligned])

    return jit


@triton.jit
def row_pointer(p, offset, ALIGN: tl.constexpr):
    """p + offset, in a form that tells the compiler that a row begins at a multiple of 128 bits, unless ALIGN is 1."""
    p_row = p + offset
    if ALIGN > 1:
        p_row = tl.multiple_of(p_row, 16)
    return p_row


@triton.jit
def row_offset(i_t, L, stride_b, stride_l, ALIGN: tl.constexpr):
    """Offset in elements of row i_t of the B * L rows of a tensor [B, L, V], in 64 bits."""
    return (i_t // L) * multiple(stride_b, ALIGN) + (i_t % L) * multiple(stride_l, ALIGN)


@triton.jit
def multiple(n, ALIGN: tl.constexpr):
    """n, in a form that tells the compiler that n is a multiple of ALIGN. The launcher makes sure of it."""
    return n // ALIGN * ALIGN


@triton.jit
def tile_offsets(LANES: tl.constexpr, VEC: tl.constexpr):
    """Offsets within a tile. The offsets of one thread differ by constants, which take no registers."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def load_tile(p_row, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr, EVICT: tl.constexpr = NO_EVICTION_HINT):
    """A tile in its stored dtype, -inf beyond V. 16-bit values take half the registers until they are converted."""
    start = i_tile * (LANES * VEC)
    o_v = tile_offsets(LANES, VEC)
    return tl.load(p_row + start + o_v, mask=o_v < V - start, other=-float("inf"), eviction_policy=EVICT)


@triton.jit
def load_terms(p_row, i_tile, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """A tile in float32, 0 beyond V, for sums."""
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
