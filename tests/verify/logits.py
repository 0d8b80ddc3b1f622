"""Operands of the kernels over rows of logits, and the variants of these kernels on tiles of a linear head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from minirl_kernels.common.checks import IGNORE_INDEX
from minirl_kernels.ops.linear_token_logprobs.tiles import gradient_in_place
from minirl_kernels.ops.token_logprobs.rows import Epilogue, LogitRows
from verify.case import Case
from verify.rows import GPT2_VOCAB, QWEN3_VOCAB, RowKernel, launch_configurations

EXPONENTS = range(9, 16)  # exponents of the powers of two up to the largest row of one tile


@dataclass(frozen=True)
class LogitOperands:
    """[T, V] logits, and a tensor [T] for each other operand except the bias."""

    logits: Tensor
    token_ids: Tensor
    temperature: Tensor
    values: Tensor  # log-probabilities, advantages, weights or gradients; the checks do not look at the values
    bias: Tensor  # [V]

    @classmethod
    def make(
        cls, rows: int, vocab_size: int, dtype: torch.dtype, padding: int, *, traps: bool = False
    ) -> LogitOperands:
        """Traps are one token without a gradient, one ignored token and one token out of range."""
        random = torch.Generator().manual_seed(vocab_size)
        buffer = torch.randn(rows, vocab_size + padding, generator=random).to(dtype)
        token_ids = torch.randint(vocab_size, (rows,), generator=random)
        values = torch.rand(rows, generator=random) - 1.5
        if traps:
            values[0], token_ids[1], token_ids[2] = 0, IGNORE_INDEX, vocab_size
        bias = torch.randn(vocab_size, generator=random)
        return cls(buffer[:, :vocab_size], token_ids, torch.full((rows,), 0.7), values, bias)

    def empty_grad(self) -> Tensor:
        """Memory for a gradient of the logits."""
        return torch.empty_like(self.logits, memory_format=torch.contiguous_format)

    @property
    def rows(self) -> LogitRows:
        return LogitRows(self.logits, self.token_ids, self.temperature)

    @property
    def epilogue(self) -> Epilogue:
        """Of a linear head: it comes between the product and the logits."""
        return Epilogue(self.bias, softcap=3.0)


def with_head(kernel: RowKernel, *, sweeps: int) -> RowKernel:
    """The kernel with softcap and bias: it reads a bias, as long as a row, in each sweep over the row.

    kernel.launch takes LogitOperands.epilogue.
    """
    return replace(
        kernel,
        name=f"{kernel.name}, softcap, bias",
        launch=lambda operands: kernel.launch(operands, epilogue=operands.epilogue),
        reads=lambda config, vocab_size: kernel.reads(config, vocab_size) + sweeps,
    )


def narrowed(kernel: RowKernel, launch_into: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> RowKernel:
    """The kernel on tiles of a linear head: a 16-bit gradient takes the memory of the float32 logits.

    launch_into(operands, grad, **epilogue) launches the kernel, which writes its gradient of the logits to grad.
    """
    return replace(
        kernel,
        name=f"{kernel.name}, {str(dtype).removeprefix('torch.')} in place",
        launch=lambda operands, **epilogue: launch_into(
            operands, gradient_in_place(operands.logits, dtype), **epilogue
        ),
        config=partial(kernel.config, out_dtype=dtype),
        out_dtype=dtype,
    )


@dataclass(frozen=True)
class TileKernels:
    """The variants of a kernel on tiles of a linear head, whose logits are float32."""

    plain: RowKernel
    with_head: RowKernel
    half: RowKernel

    @classmethod
    def of(cls, kernel: RowKernel, launch_into: Callable[..., tuple[Tensor, ...]], *, sweeps: int) -> TileKernels:
        """launch_into is as for narrowed, sweeps as for with_head."""
        plain = narrowed(kernel, launch_into, torch.bfloat16)
        return cls(plain, with_head(plain, sweeps=sweeps), narrowed(kernel, launch_into, torch.float16))

    def interpreted(self) -> Iterator[Case]:
        for kernel in (self.plain, self.with_head):
            yield from interpreted_with_head(kernel)

    def compiled(self) -> Iterator[Case]:
        powers = [2**exponent for exponent in EXPONENTS]
        yield from launch_configurations(self.plain, torch.float32, powers, QWEN3_VOCAB)
        yield from launch_configurations(self.plain, torch.float32, [power - 1 for power in powers], GPT2_VOCAB)
        yield from compiled_with_head(self.with_head)
        yield self.half.case(QWEN3_VOCAB, torch.float32)


def interpreted_with_head(kernel: RowKernel) -> Iterator[Case]:
    yield kernel.case(777, torch.float32, padding=15)
    yield kernel.case(20_011, torch.float32)
    yield kernel.case(40_000, torch.float32, padding=8)


def compiled_with_head(kernel: RowKernel) -> Iterator[Case]:
    yield kernel.case(QWEN3_VOCAB, torch.float32)
    yield kernel.case(GPT2_VOCAB, torch.float32)
