"""Cases of the kernels of token_logprobs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case
from verify.logits import (
    EXPONENTS,
    LogitRows,
    TileKernels,
    compiled_with_head,
    interpreted_with_head,
    with_head,
)
from verify.rows import QWEN3_VOCAB, RowKernel, compiled, interpreted

from minirl_kernels.ops.token_logprobs import triton


def _forward(rows: LogitRows, *, with_entropy: bool = True, **head) -> tuple[Tensor, ...]:
    return triton.forward(rows.logits, rows.token_ids, rows.temperature, with_entropy, **head)


def _backward(rows: LogitRows, *, with_entropy: bool = True) -> tuple[Tensor, ...]:
    return _backward_into(rows, rows.empty_grad(), with_entropy=with_entropy)


def _backward_into(rows: LogitRows, out: Tensor, *, with_entropy: bool = True, **head) -> tuple[Tensor, ...]:
    shift = rows.logits.float().amax(-1)
    per_token = (shift, rows.values, rows.values, rows.values, rows.values if with_entropy else None)
    triton.backward(rows.logits, rows.token_ids, rows.temperature, *per_token, out, **head)
    return (out,)


FORWARD = RowKernel("token_logprobs", LogitRows.make, _forward, triton.forward_config, streams_out=False)
BACKWARD = RowKernel("token_logprobs_backward", LogitRows.make, _backward, triton.backward_config)
FORWARD_WITH_HEAD = with_head(FORWARD, sweeps=1)
ON_TILES = TileKernels.of(BACKWARD, _backward_into, sweeps=1)


def interpreter_cases() -> Iterator[Case]:
    for kernel in (FORWARD, BACKWARD):
        yield from interpreted(kernel)
    yield from interpreted_with_head(FORWARD_WITH_HEAD)
    yield from ON_TILES.interpreted()


def compile_cases() -> Iterator[Case]:
    for kernel in (FORWARD, BACKWARD):
        yield from compiled(kernel, EXPONENTS)
    yield from compiled_with_head(FORWARD_WITH_HEAD)
    yield from ON_TILES.compiled()
    for kernel in (FORWARD, BACKWARD):
        launch = partial(kernel.launch, with_entropy=False)
        yield replace(kernel, name=f"{kernel.name} without entropy", launch=launch).case(QWEN3_VOCAB, torch.bfloat16)
