"""Tile sizes of kernels, as functions of sizes and dtypes alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .sizes import next_power_of_2


class Threads:
    """Part of a tile's record. threads: of a program."""

    threads: int

    @property
    def num_warps(self) -> int:
        return max(self.threads // (64 if torch.version.hip else 32), 1)


@dataclass(frozen=True)
class LaunchConfig(Threads):
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


@dataclass(frozen=True)
class TileConfig(Threads):
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


def sizes_of(*tensors: Tensor) -> tuple[int, ...]:
    """(L, V, then the strides of B and L of each tensor) of tensors of one shape, [B, L, V] or [L, V]."""
    strides = [stride for x in tensors for stride in row_strides(x)[1:]]
    return tensors[0].shape[-2], tensors[0].shape[-1], *strides


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """(L, stride of B, stride of L) of x [B, L, V], or of x [T, V] as one batch entry."""
    return x.shape[-2], x.stride(0) if x.dim() == 3 else 0, x.stride(-2)
