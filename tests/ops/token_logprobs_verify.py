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
    LogitOperands,
    TileKernels,
    compiled_with_head,
    interpreted_with_head,
    with_head,
)
from verify.rows import QWEN3_VOCAB, RowKernel, compiled, interpreted

from minirl_kernels.ops.token_logprobs import triton
from minirl_kernels.ops.token_logprobs.rows import NO_EPILOGUE, Epilogue, RowGradients


def _forward(
    operands: LogitOperands, *, with_entropy: bool = True, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, ...]:
    return triton.forward(operands.rows, with_entropy, epilogue)


def _backward(operands: LogitOperands, *, with_entropy: bool = True) -> tuple[Tensor, ...]:
    return _backward_into(operands, operands.empty_grad(), with_entropy=with_entropy)


def _backward_into(
    operands: LogitOperands, out: Tensor, *, with_entropy: bool = True, epilogue: Epilogue = NO_EPILOGUE
) -> tuple[Tensor, ...]:
    gradients = RowGradients(
        shift=operands.logits.float().amax(-1),
        log_sum=operands.values,
        entropy=operands.values,
        grad_log_probs=operands.values,
        grad_entropy=operands.values if with_entropy else None,
    )
    triton.backward(operands.rows, gradients, out, epilogue)
    return (out,)


FORWARD = RowKernel("token_logprobs", LogitOperands.make, _forward, triton.forward_config, streams_out=False)
BACKWARD = RowKernel("token_logprobs_backward", LogitOperands.make, _backward, triton.backward_config)
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
