"""Cases of the kernel of fused_policy_loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case
from verify.logits import EXPONENTS, LogitOperands, TileKernels
from verify.rows import QWEN3_VOCAB, RowKernel, compiled, interpreted, twice_less_a_tile

from minirl_kernels.ops.fused_policy_loss import triton
from minirl_kernels.ops.fused_policy_loss.loss_rows import LossRows
from minirl_kernels.ops.token_logprobs.rows import NO_EPILOGUE, Epilogue


def _launch_into(
    operands: LogitOperands, out: Tensor, epilogue: Epilogue = NO_EPILOGUE, **options
) -> tuple[Tensor, ...]:
    """options: fields of the loss that differ from the default."""
    loss = LossRows(
        old_log_probs=operands.values,
        behaviour_log_probs=operands.values,
        ref_log_probs=operands.values,
        advantages=operands.values,
        weights=operands.values,
        objective="minirl",
        clip=True,
        ratio_low=0.0,
        ratio_high=float("inf"),
        threshold=5.0,
        kl_coef=0.1,
        kl_estimator="k3",
        entropy_coef=0.01,
    )
    return *triton.forward_backward(operands.rows, loss._replace(**options), out, epilogue), out


def _launch(operands: LogitOperands, **options) -> tuple[Tensor, ...]:
    return _launch_into(operands, operands.empty_grad(), **options)


KERNEL = RowKernel("fused_policy_loss", LogitOperands.make, _launch, triton.launch_config, twice_less_a_tile)
IN_PLACE = replace(
    KERNEL, name="fused_policy_loss in place", launch=lambda operands: _launch_into(operands, operands.logits)
)
ON_TILES = TileKernels.of(KERNEL, _launch_into, sweeps=2)
# every branch of the kernel that KERNEL does not compile
OTHER_BRANCHES = {
    "minirl without KL": {"ref_log_probs": None},
    "minirl on policy": {"old_log_probs": None, "kl_estimator": "k1"},
    "minirl without clip and rollout_is": {"clip": False, "behaviour_log_probs": None},
    "reinforce": {"objective": "reinforce", "clip": False, "kl_estimator": "k2"},
    "grpo": {"objective": "grpo"},
    "grpo without clip, on policy": {"objective": "grpo", "clip": False, "old_log_probs": None},
    "cispo": {"objective": "cispo", "old_log_probs": None, "behaviour_log_probs": None},
    "cispo without clip": {"objective": "cispo", "clip": False},
}


def interpreter_cases() -> Iterator[Case]:
    for kernel in (KERNEL, IN_PLACE):
        yield from interpreted(kernel)
    yield from ON_TILES.interpreted()


def compile_cases() -> Iterator[Case]:
    """IN_PLACE compiles to the same code as KERNEL."""
    yield from compiled(KERNEL, EXPONENTS)
    yield from ON_TILES.compiled()
    for name, options in OTHER_BRANCHES.items():
        kernel = replace(KERNEL, name=f"{KERNEL.name}: {name}", launch=partial(_launch, **options))
        yield kernel.case(QWEN3_VOCAB, torch.bfloat16)
