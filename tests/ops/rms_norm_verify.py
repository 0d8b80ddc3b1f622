"""Cases of the kernels of rms_norm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case
from verify.columns import column_kernel, compiled_columns, interpreted_columns
from verify.rows import QWEN3_VOCAB, RowKernel, Rows, compiled, interpreted, twice_less_a_tile

from minirl_kernels.common.triton.columns import SHORTEST_BLOCK, ColumnConfig, rows_per_block
from minirl_kernels.ops.rms_norm import triton


def _forward(rows: Rows, *, with_weight: bool = True) -> tuple[Tensor, ...]:
    return triton.forward(rows.x, rows.weight if with_weight else None, 1e-6)


def _backward(rows: Rows, *, with_weight: bool = True) -> tuple[Tensor, ...]:
    weight = rows.weight if with_weight else None
    return triton.backward(rows.grad, rows.x, weight, rows.rstd, True, False)[:1]


def _weight_grad(rows: Rows) -> tuple[Tensor, ...]:
    return (triton.weight_partials(rows.x, rows.grad, rows.rstd, rows_per_block(len(rows.x))),)


def _rstd_in_each_lane(config: ColumnConfig) -> int:
    """Bytes; the cases that are run have blocks of the shortest length."""
    return 4 * config.threads * SHORTEST_BLOCK


KERNELS = (
    RowKernel(
        "rms_norm",
        Rows.make,
        _forward,
        triton.forward_config,
        lambda config, size: 1 + twice_less_a_tile(config, size),
    ),
    RowKernel(
        "rms_norm_backward",
        Rows.make,
        _backward,
        triton.backward_config,
        lambda config, size: 3 * twice_less_a_tile(config, size),
    ),
)
WEIGHT_GRAD = column_kernel("rms_norm d weight", _weight_grad, inputs=2, beside=_rstd_in_each_lane)


def interpreter_cases() -> Iterator[Case]:
    for kernel in KERNELS:
        yield from interpreted(kernel)
    yield from interpreted_columns(WEIGHT_GRAD)


def compile_cases() -> Iterator[Case]:
    for kernel in KERNELS:
        yield from compiled(kernel, range(6, 15))
    for kernel in KERNELS:
        plain = replace(kernel, name=f"{kernel.name}, no weight", launch=partial(kernel.launch, with_weight=False))
        yield plain.case(QWEN3_VOCAB, torch.bfloat16)
    yield from compiled_columns(WEIGHT_GRAD)
