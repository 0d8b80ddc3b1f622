"""Sums of columns: each thread adds the rows of its own columns, one by one.

The rows are cut into blocks, whose length is a function of the number of rows. A thread adds the rows of a block in
their order, in float32. A second launch adds the sums of the blocks in the same way. No thread needs a value of another
thread. So the bits of a column are a function of its elements alone: neither the other columns, nor strides, addresses
or the tile change them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .config import Threads
from .launch import Launch
from .sizes import cdiv

# fewer lanes of 128 bits than this leave processors without a program, so each lane has one column instead
LEAST_WIDE_LANES = 2**15
SHORTEST_BLOCK = 128


@triton.jit
def column_tile(outer, V, LANES: tl.constexpr, VEC: tl.constexpr):
    """(row of the output [LANES, 1], its columns [LANES, VEC], whether the lane has columns) of this program.

    A program has a part of one row, or several whole rows of fewer lanes. It divides in 32 bits, unless `outer` has 64.
    outer: number of rows of the output; each has V columns. V is a multiple of VEC.
    """
    lanes_per_row = V // VEC
    rows = tl.maximum(LANES // lanes_per_row, 1)
    tiles = tl.cdiv(lanes_per_row, LANES)
    i_program = tl.program_id(0)
    i_lane = tl.arange(0, LANES)[:, None]
    i_out = (i_program // tiles).to(tl.int64) * rows + i_lane // lanes_per_row
    i_column = (i_program % tiles).to(tl.int64) * LANES + i_lane % lanes_per_row
    m_lane = (i_lane < rows * lanes_per_row) & (i_column < lanes_per_row) & (i_out < outer)
    return tl.where(m_lane, i_out, 0).to(outer.dtype), i_column * VEC + tl.arange(0, VEC)[None, :], m_lane


def column_programs(outer: int, size: int, config: ColumnConfig) -> int:
    """Number of programs of column_tile."""
    lanes = size // config.vec
    return cdiv(outer, max(config.threads // lanes, 1)) * cdiv(lanes, config.threads)


def rows_per_block(rows: int) -> int:
    """Number of rows that one thread adds. Two stages are enough: there are no more blocks than rows of a block."""
    block = SHORTEST_BLOCK
    while block * block < rows:
        block *= 2
    return block


@dataclass(frozen=True)
class ColumnConfig(Threads):
    """The tile of a program.

    vec: neighbouring columns of a thread; 1, or one 128-bit access.
    rows: number of rows whose loads are in flight.
    """

    vec: int
    rows: int
    threads: int = 128

    @property
    def tile(self) -> int:
        return self.threads * self.vec


def column_config(outer: int, size: int, strides: tuple[int, ...], inputs: tuple[Tensor, ...]) -> ColumnConfig:
    """The tile for `outer` times `size` columns of `inputs`, which have one dtype and these strides."""
    vec = 16 // inputs[0].element_size()
    fits = all(n % vec == 0 for n in (size, *strides)) and all(x.data_ptr() % 16 == 0 for x in inputs)
    if fits and outer * size >= LEAST_WIDE_LANES * vec:
        return ColumnConfig(vec, rows=min(8 // len(inputs), 32 // vec))
    return ColumnConfig(1, rows=16 // len(inputs))


def over_columns(
    kernel: Any, outer: int, *values, size: int, strides: tuple[int, ...], inputs: tuple[Tensor, ...]
) -> Launch:
    """The launch of a kernel over `outer` times `size` columns. `column_config` describes the other arguments."""
    config = column_config(outer, size, strides, inputs)
    tile = {"LANES": config.threads, "VEC": config.vec, "ROWS": config.rows, "num_warps": config.num_warps}
    return Launch(kernel, (column_programs(outer, size, config),), values, tile)
