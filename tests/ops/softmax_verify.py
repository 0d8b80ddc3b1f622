"""Cases of the kernels of softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case
from verify.rows import QWEN3_VOCAB, RowKernel, Rows, compiled, interpreted, twice_less_a_tile

from minirl_kernels.ops.softmax import triton


def _forward(rows: Rows, *, log: bool = False) -> tuple[Tensor, ...]:
    return (triton.forward(rows.x, -1, log, rows.x.dtype),)


def _backward(rows: Rows, *, log: bool = False) -> tuple[Tensor, ...]:
    return (triton.backward(rows.grad, rows.output, -1, log, rows.x.dtype),)


KERNELS = (
    RowKernel("softmax", Rows.make, _forward, triton.forward_config, twice_less_a_tile),
    RowKernel(
        "softmax_backward",
        Rows.make,
        _backward,
        triton.backward_config,
        lambda config, size: 2 * twice_less_a_tile(config, size),
    ),
)


def interpreter_cases() -> Iterator[Case]:
    for kernel in KERNELS:
        yield from interpreted(kernel)


def compile_cases() -> Iterator[Case]:
    for kernel in KERNELS:
        yield from compiled(kernel, range(6, 15))
    for kernel in KERNELS:
        logarithm = replace(kernel, name=f"{kernel.name}, logarithm", launch=partial(kernel.launch, log=True))
        yield logarithm.case(QWEN3_VOCAB, torch.bfloat16)
