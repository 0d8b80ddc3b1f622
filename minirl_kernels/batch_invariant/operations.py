"""The operations of aten that become ours: by their overloads, in the arguments that torch calls them with.

Each op of this library says which ones its kernels compute (ops/<op>/aten.py). A function returns a new tensor, or
NotImplemented for every call that is not exactly one that ours computes: torch then computes it, or raises its own
error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .. import layers  # noqa: F401  its ops are those that override operations
from ..common.library import OPS


def operations(key: str) -> Iterator[tuple[str, Callable]]:
    """(overload, function that computes its result) for a dispatch key, "CPU" or "CUDA"."""
    backend = {"CPU": "cpu", "CUDA": "triton"}[key]
    for op in OPS:
        yield from op.overrides(backend).items()
