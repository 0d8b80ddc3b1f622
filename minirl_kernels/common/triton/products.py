"""The order in which the kernels with matrix products add terms, and the order of their programs.

The order of a sum is a function of the number of its terms, the dtype and the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import dot

# The terms of one chain of fused multiply-adds in float32, and the chains of a block. The error of a sum grows with the
# root of the number of its additions in sequence: for 8,192 terms 16 + 32 + 16 instead of 8,192.
CHAIN = tl.constexpr(16)
CHAINS_OF_BLOCK = tl.constexpr(32)

# The GPUs on which all tiles of the product kernels were measured to give the same bits in 16-bit dtypes, so that the
# number of rows may choose a tile. A test on the GPU compares the tiles.
SAME_BITS_IN_ALL_TILES = ("sm_90",)


@triton.jit
def tile_of_program(tiles_m, tiles_n, BAND: tl.constexpr):
    """(matrix, tile of rows, tile of columns) of this program.

    Neighbouring programs are in a band of BAND tiles of rows, so that they share rows and columns in the cache.
    """
    i = tl.program_id(0)
    i_b = i // (tiles_m * tiles_n)
    i -= i_b * (tiles_m * tiles_n)
    first = i // (BAND * tiles_n) * BAND
    i -= first * tiles_n
    height = tl.minimum(tiles_m - first, BAND)
    return i_b.to(tl.int64), first + i % height, i // height


@triton.jit
def add_products(b_a, b_b, b_block, b_sum, i_d):
    """(b_block, b_sum) after step i_d over the terms of a sum: b_a b_b is added.

    float32: a step is a chain, which is added to its block. A block is added to the sum at its end.
    16-bit: all terms are one chain, by tensor cores. b_block stays 0, and takes no registers.
    """
    if b_a.dtype == tl.float32:
        tl.static_assert(b_a.shape[1] == CHAIN, "a step must be one chain")
        b_chain = dot(b_a, b_b, tl.zeros_like(b_sum))
        # the compiler would make one chain of chain + block
        b_block = tl.fma(b_chain, 1.0, b_block)
        if (i_d + 1) // CHAINS_OF_BLOCK * CHAINS_OF_BLOCK == i_d + 1:
            b_sum += b_block
            b_block = tl.zeros_like(b_sum)
    else:
        b_sum = dot(b_a, b_b, b_sum)
    return b_block, b_sum


@triton.jit
def sum_of_blocks(b_block, b_sum, dtype: tl.constexpr):
    """The sum after the last step. dtype: of the operands."""
    if dtype == tl.float32:
        b_sum += b_block
    return b_sum
