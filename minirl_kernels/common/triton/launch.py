"""Tile sizes and launches of kernels, as functions of sizes and dtypes alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import is_aligned
from .sizes import next_power_of_2


@dataclass(frozen=True)
class LaunchConfig:
    """The tile of a row, a function of V and the dtype alone, so that a token does not depend on other tokens.

    lanes, vec: a tile has lanes * vec elements; vec elements make one 128-bit access.
    threads: of a program.
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
    """The tile of a matrix product. The order of a sum does not depend on it, or it does not depend on other rows.

    rows, columns: of the tile of a program.
    depth: number of terms of a sum in one step.
    threads: of a program.
    stages: number of steps whose loads are in flight.
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


@functools.cache  # its arithmetic takes as long as a launch
def make_config(vocab_size: int, dtype: torch.dtype, *, threads: int, per_thread: int) -> LaunchConfig:
    """A tile with `per_thread` logits for each of `threads` threads. A short row has fewer threads, 64 at least.

    dtype: the narrowest dtype of the tensors that are loaded and stored.
    """
    wanted = next_power_of_2(vocab_size) // per_thread
    threads = min(max(wanted, 64), threads)
    vec = 16 // dtype.itemsize
    return LaunchConfig(lanes=threads * per_thread // vec, vec=vec, threads=threads)


def is_whole(vocab_size: int, dtype: torch.dtype) -> bool:
    """Whether a row is a whole number of 128-bit accesses."""
    return vocab_size * dtype.itemsize % 16 == 0


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """(L, stride of B, stride of L) of x [B, L, V], or of x [T, V] as one batch entry."""
    return x.shape[-2], x.stride(0) if x.dim() == 3 else 0, x.stride(-2)


def launch(kernel, grid: tuple[int, ...], *args, config: LaunchConfig, rows: tuple[Tensor, ...], **constants) -> None:
    """Run `kernel` over tiles of `rows` (tensors of one shape [..., V]) on their device.

    It uses 128-bit accesses if all of the rows are aligned. A kernel with sums gets rows that went through `aligned`.
    """
    if 0 in grid:
        return
    wide = all(is_aligned(x, config.vec) for x in rows)
    with torch.cuda.device_of(rows[0]):
        kernel[grid](
            *args,
            **constants,
            LANES=config.lanes,
            VEC=config.vec,
            ALIGN=config.vec if wide else 1,
            num_warps=config.num_warps,
        )
