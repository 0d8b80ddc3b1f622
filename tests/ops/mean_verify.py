"""Cases of the kernels of mean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from verify.case import Case
from verify.columns import column_kernel, compiled_columns, interpreted_columns
from verify.rows import RowKernel, Rows, compiled, interpreted

from minirl_kernels.common.triton.columns import rows_per_block
from minirl_kernels.ops.mean import triton


def _of_rows(rows: Rows) -> tuple[Tensor, ...]:
    """The first launch of a sum over rows; a row of several blocks needs more launches."""
    count, size = rows.x.shape
    out = torch.empty(count, -(-size // triton.BLOCK))
    triton.reduce_row_blocks(rows.x[None], out, size)
    return (out,)


def _of_columns(rows: Rows) -> tuple[Tensor, ...]:
    """The first launch of a sum over columns; rows of several blocks need another."""
    count, size = rows.x.shape
    block = rows_per_block(count)
    out = torch.empty(-(-count // block), size)
    triton.reduce_column_blocks(rows.x[None, None], out, block=block, divisor=count)
    return (out,)


OF_ROWS = RowKernel("mean", Rows.make, _of_rows, triton.rows_config, streams_out=False)
OF_COLUMNS = column_kernel("mean of columns", _of_columns, inputs=1)


def interpreter_cases() -> Iterator[Case]:
    yield from interpreted(OF_ROWS)
    yield from interpreted_columns(OF_COLUMNS)


def compile_cases() -> Iterator[Case]:
    yield from compiled(OF_ROWS, range(6, 15))
    yield from compiled_columns(OF_COLUMNS)
