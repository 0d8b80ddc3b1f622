"""The launches that a call makes, and the GPU that they are for. No kernel runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from unprepared import unprepared

from minirl_kernels.common.triton import architecture
from minirl_kernels.common.triton.config import TileConfig


class CapturedLaunch(NamedTuple):
    kernel: JITFunction | InterpretedFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def captured() -> Iterator[list[CapturedLaunch]]:
    """Capture the launches made inside; their kernels do not run."""
    launches: list[CapturedLaunch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(CapturedLaunch(self, tuple(grid), args, kwargs))

    by_triton = (mock.patch.object(kind, "run", run) for kind in (JITFunction, InterpretedFunction))
    with unprepared(), next(by_triton), next(by_triton):
        yield launches


@contextmanager
def on_gpu(name: str) -> Iterator[None]:
    """Launchers inside launch for this GPU, "sm_90" or "gfx942"."""
    vendor = mock.patch.object(torch.version, "hip", "0" if name.startswith("gfx") else None)
    with vendor, mock.patch.object(architecture, "of", return_value=name):
        yield


def tile_of(launch: CapturedLaunch) -> TileConfig:
    """The tile of a kernel with a product."""
    constants = launch.kwargs
    return TileConfig(
        rows=constants["BLOCK_M"],
        columns=constants["BLOCK_N"],
        depth=constants["BLOCK_D"],
        threads=constants["num_warps"] * (64 if torch.version.hip else 32),
        stages=constants["num_stages"],
    )
