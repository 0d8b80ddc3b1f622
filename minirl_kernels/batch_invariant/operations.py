"""The aten overloads that the mode overrides, and for each a function with the overload's arguments.

Each op of this library names the overloads that its kernels compute (ops/<op>/aten.py). A function returns a new
tensor, or NotImplemented for a call that the kernels do not compute. torch then computes the call, or raises its own
error. All functions run below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .. import layers  # noqa: F401  importing the ops fills OPS
from ..common.library import OPS


def operations(key: str) -> Iterator[tuple[str, Callable]]:
    """(overload, function that computes its result) for each override of a dispatch key, "CPU" or "CUDA"."""
    backend = {"CPU": "cpu", "CUDA": "triton"}[key]
    for op in OPS:
        yield from op.overrides(backend).items()
