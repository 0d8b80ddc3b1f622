"""Cases of the kernel that scales a gradient in place, which several losses share."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from verify.case import Case
from verify.logits import EXPONENTS, LogitOperands
from verify.rows import RowKernel, compiled, interpreted

from minirl_kernels.common.triton import scale


def _launch(rows: LogitOperands) -> tuple[Tensor, ...]:
    scale.scale_in_place(rows.logits, rows.temperature[0])
    return (rows.logits,)


KERNEL = RowKernel("scale_in_place", LogitOperands.make, _launch, scale.launch_config)


def interpreter_cases() -> Iterator[Case]:
    yield from interpreted(KERNEL)


def compile_cases() -> Iterator[Case]:
    yield from compiled(KERNEL, EXPONENTS)
