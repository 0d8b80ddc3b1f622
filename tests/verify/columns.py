"""Kernels that sum over rows, column by column."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirl_kernels.common.triton.columns import LEAST_WIDE_LANES, ColumnConfig, column_config
from verify.case import Case
from verify.rows import RowKernel, Rows, few_numbers

# enough columns for accesses of 128 bits in every dtype
MANY = 8 * LEAST_WIDE_LANES


def column_kernel(
    name: str,
    launch: Callable[[Rows], tuple[Tensor, ...]],
    *,
    inputs: int,
    beside: Callable[[ColumnConfig], int] = few_numbers,
) -> RowKernel:
    """A kernel over `inputs` tensors. beside: as in RowKernel."""

    def config(size: int, dtype: torch.dtype) -> ColumnConfig:
        return column_config(1, size, (size,), (torch.empty(0, dtype=dtype),) * inputs)

    return RowKernel(
        name,
        Rows.make,
        launch,
        config,
        reads=lambda config, size: inputs,
        beside=beside,
        streams_out=False,
        sums_rows=True,
    )


def interpreted_columns(kernel: RowKernel) -> Iterator[Case]:
    """Rows of one block and of several; a row of several programs, and several rows of a program; wide accesses."""
    yield kernel.case(200, torch.float32, rows=50)
    yield kernel.case(70, torch.bfloat16, rows=500, padding=15)
    yield kernel.case(3, torch.float16, rows=900)
    yield kernel.case(MANY, torch.bfloat16, rows=2)


def compiled_columns(kernel: RowKernel) -> Iterator[Case]:
    """Both tiles of each dtype."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        yield kernel.case(MANY, dtype)
        yield kernel.case(2_047, dtype)
