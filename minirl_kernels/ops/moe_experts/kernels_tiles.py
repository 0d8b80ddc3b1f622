"""The tiles of the products of moe_experts, as functions of sizes, dtype and GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.triton import architecture
from ...common.triton.config import TileConfig, is_whole
from ...common.triton.products import SAME_BITS_IN_ALL_TILES
from ...common.triton.sizes import cdiv


class Tiles(NamedTuple):
    up: TileConfig
    product: TileConfig
    activation_grad: TileConfig
    gate_up_grad: TileConfig  # of d gate_up_proj
    down_grad: TileConfig  # of d down_proj


# Float32 operands are multiplied from registers, and so their tiles are smaller.
_FLOAT32 = TileConfig(rows=64, columns=64, depth=16, threads=256, stages=3)
# 64 rows are the fewest that tensor cores multiply at once on sm_90 and sm_100. In decoding an expert has fewer rows.
# Threads and depth leave enough registers where each element takes an address.
_NARROW = TileConfig(rows=64, columns=128, depth=32, threads=256, stages=4)
_SQUARE = replace(_NARROW, rows=128)
_LARGE = TileConfig(rows=128, columns=128, depth=64, threads=256, stages=3)
# A kernel with two tiles of results has half as many columns. A weight gradient reads each operand again for every
# tile of the other, and so its tile is square.
FLOAT32_TILES = Tiles(replace(_FLOAT32, columns=32), _FLOAT32, replace(_FLOAT32, columns=32), _FLOAT32, _FLOAT32)
NARROW_TILES = Tiles(replace(_NARROW, columns=64), _NARROW, replace(_NARROW, columns=64), _SQUARE, _SQUARE)
# AMD GPUs have 64 KiB of shared memory, a third of NVIDIA's
AMD_TILES = Tiles(*(replace(tile, stages=2) for tile in NARROW_TILES))
LARGE_TILES = Tiles(
    replace(_LARGE, columns=64), replace(_LARGE, columns=256), replace(_LARGE, columns=64), _LARGE, _LARGE
)
FEW_ROWS_TILES = Tiles(NARROW_TILES.up, NARROW_TILES.product, *LARGE_TILES[2:])
# with fewer rows for each expert, most rows of a large tile would be empty
FEWEST_ROWS = 64


def tiles(x: Tensor, sizes: Sequence[int], mean_rows: int) -> Tiles:
    """The tiles for operands like x. They are large on GPUs that were measured, if the sizes are whole.

    sizes: of the matrices.
    mean_rows: of an expert. They choose the tiles of products whose outputs have the same bits in all tiles. The tile
        of activation_grad does not depend on them, because it sums over columns.
    """
    if x.dtype == torch.float32:
        return FLOAT32_TILES
    gpu = architecture.of(x.device)
    if gpu not in SAME_BITS_IN_ALL_TILES or not are_whole(sizes, x.dtype):
        return AMD_TILES if gpu.startswith("gfx") else NARROW_TILES
    if mean_rows < FEWEST_ROWS:
        return FEW_ROWS_TILES
    return LARGE_TILES


def are_whole(sizes: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether each of two sizes is a whole number of 128-bit accesses."""
    first, second = sizes
    return is_whole(first, dtype) and is_whole(second, dtype)


def weight_parts(down_proj: Tensor) -> int:
    """Number of parts of I. d weight is summed within each part, then over the parts. down_proj: [E, H, I]."""
    _, hidden_size, width = down_proj.shape
    return cdiv(width, tiles(down_proj, (hidden_size, width), 0).activation_grad.columns)
