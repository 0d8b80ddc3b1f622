"""A case: one kernel in one launch configuration. It is the only kind of case that the checks know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Config(Protocol):
    """A launch configuration of any kernel."""

    @property
    def tile(self) -> int: ...  # elements

    @property
    def threads(self) -> int: ...


@dataclass(frozen=True)
class Case:
    """How to launch a kernel once, and the bounds that the launch must keep.

    name, dtype, size: its row of the compile matrix. sizes: every size of its operands, for messages.
    operands(traps=...): the arguments of launch, the same every time. With traps some of them are treated apart by the
        kernel: an ignored token, an empty group.
    launch(operands): launches the kernel once and returns every tensor that it writes.
    config(): its launch configuration. It may depend on the vendor of the GPU, so a check asks for it when needed.
    most_loaded(programs): the most bytes that a launch of so many programs may load.
    unit, unit_bytes: the traffic is printed in multiples of unit_bytes, which is the size of the unit.
    loads_wide, stores_wide: whether the kernel must use accesses of 128 bits.
    on_tensor_cores: whether the kernel must use instructions of tensor cores.
    alike(): cases that must sum in the order of this one. Their operands have the same reduced sizes and dtype, and
        other strides, other numbers of rows, or other numbers of columns.
    """

    name: str
    dtype: torch.dtype
    size: str
    sizes: str
    operands: Callable[..., Any]
    launch: Callable[[Any], tuple[Tensor, ...]]
    config: Callable[[], Config]
    most_loaded: Callable[[int], int]
    unit: str
    unit_bytes: int
    loads_wide: bool = False
    stores_wide: bool = False
    on_tensor_cores: bool = False
    alike: Callable[[], Iterable[Case]] = tuple

    def run(self, *, traps: bool = False) -> tuple[Tensor, ...]:
        """Launch the kernel once; returns every tensor that it writes."""
        return self.launch(self.operands(traps=traps))

    def __str__(self) -> str:
        return f"{self.name}, {str(self.dtype).removeprefix('torch.')}, {self.sizes}"


def allow_wide_accesses(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether each of the sizes, in elements, is a whole number of accesses of 128 bits."""
    return all(size * dtype.itemsize % 16 == 0 for size in sizes)


def blocks(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def gap(padding: int, between: str = "rows") -> str:
    """The part of Case.sizes that tells how far apart strided operands lie."""
    return f", {padding} between {between}" if padding else ""
