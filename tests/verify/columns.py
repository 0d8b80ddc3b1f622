"""Kernels that sum over rows, column by column."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minirl_kernels.ops.mean.triton import columns_config
from verify.case import Case
from verify.rows import RowKernel, Rows


def column_kernel(name: str, launch: Callable[[Rows], tuple[Tensor, ...]], *, reads: int) -> RowKernel:
    """A program may read one float32 for each row of its block, in addition to the rows."""
    return RowKernel(
        name,
        Rows.make,
        launch,
        config=lambda size, dtype: columns_config(),
        reads=lambda config, size: reads,
        beside=lambda config: 4 * config.block,
        streams_out=False,
        sums_rows=True,
    )


def interpreted_columns(kernel: RowKernel) -> Iterator[Case]:
    """Rows of one block, and of several."""
    yield kernel.case(200, torch.float32, rows=50)
    yield kernel.case(70, torch.bfloat16, rows=2_500, padding=15)


def compiled_columns(kernel: RowKernel) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        yield kernel.case(2_048, dtype)
        yield kernel.case(2_047, dtype)
    yield kernel.case(2_048, torch.float16)
