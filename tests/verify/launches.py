"""The launches that a call makes: kernels, grids and arguments. No kernel runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


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

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(InterpretedFunction, "run", run):
        yield launches
