"""Cases of the kernels of moe_routing. A row holds the router's logits of a token, in one tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from verify.case import Case
from verify.logits import LogitOperands
from verify.rows import RowKernel

from minirl_kernels.common.checks import IGNORE_INDEX
from minirl_kernels.common.triton.config import LaunchConfig
from minirl_kernels.ops.moe_routing import triton


def _forward(
    rows: LogitOperands, *, replay=True, norm=True, scoring="softmax", with_bias=False, groups=(1, 1), top_k=4
) -> tuple[Tensor, ...]:
    """The traps are a row that routes naturally and a row with an expert out of range."""
    ids, num_experts = rows.token_ids[:, None], rows.logits.shape[1]
    routed = ((ids + torch.arange(top_k)) % num_experts).where(ids < num_experts, ids) if replay else None
    valid = rows.token_ids != IGNORE_INDEX if replay else None
    bias = torch.zeros(num_experts) if with_bias else None
    *found, natural = triton.forward(rows.logits, top_k, routed, valid, norm, scoring, bias, *groups, 2.0)
    return (*found, *natural)


def _backward(rows: LogitOperands, *, norm=False, scoring="softmax", top_k=4) -> tuple[Tensor, ...]:
    weights = rows.values[:, None].expand(-1, top_k).contiguous()
    experts = (rows.token_ids[:, None] + torch.arange(top_k)) % rows.logits.shape[1]
    out = rows.empty_grad()
    triton.backward(rows.logits, weights, experts, weights, norm, scoring, 2.0, out)
    return (out,)


def _logits_and_bias(config: LaunchConfig, num_experts: int) -> float:
    return 1 + config.vec / 4  # the bias is float32, a logit has 16 / vec bytes


def _chosen_alone(config: LaunchConfig, num_experts: int) -> float:
    return 4 / num_experts


FORWARD = RowKernel("moe_routing", LogitOperands.make, _forward, triton.launch_config, streams_out=False)
BACKWARD = RowKernel("moe_routing_backward", LogitOperands.make, _backward, triton.launch_config)
BY_GROUPS = replace(
    FORWARD,
    name="moe_routing by groups",
    launch=partial(_forward, scoring="sigmoid", with_bias=True, groups=(4, 2)),
    reads=_logits_and_bias,
)
# every branch of the kernels that the three kernels above do not compile
OTHER_FORWARDS = {
    "softmax of all": {"norm": False, "replay": False},
    "sigmoid": {"norm": False, "scoring": "sigmoid"},
    "sigmoid, normalised": {"scoring": "sigmoid"},
    "softmax and bias": {"with_bias": True, "top_k": 8},
    "softmax by groups": {"groups": (4, 2)},
}
OTHER_BACKWARDS = {
    "softmax, normalised": {"norm": True},
    "sigmoid": {"scoring": "sigmoid"},
    "sigmoid, normalised": {"norm": True, "scoring": "sigmoid", "top_k": 8},
}


def _other_branches() -> Iterator[RowKernel]:
    yield BY_GROUPS
    for name, options in OTHER_FORWARDS.items():
        yield replace(FORWARD, name=f"{FORWARD.name}: {name}", launch=partial(_forward, **options))
    for name, options in OTHER_BACKWARDS.items():
        launch = partial(_backward, **options)
        yield replace(BACKWARD, name=f"{BACKWARD.name}: {name}", launch=launch, reads=_chosen_alone)


def interpreter_cases() -> Iterator[Case]:
    for kernel in (FORWARD, BACKWARD, BY_GROUPS):
        yield kernel.case(128, torch.float32)
        yield kernel.case(60, torch.bfloat16, padding=15)
        yield kernel.case(1_024, torch.bfloat16, padding=8)


def compile_cases() -> Iterator[Case]:
    sizes_of = {
        torch.bfloat16: [256, 512, 1_024, 2_048, 4_096, 60],
        torch.float32: [128, 256, 512, 1_024, 2_048, 4_096, 60],
        torch.float16: [128],
    }
    for kernel in (FORWARD, BACKWARD):
        for dtype, sizes in sizes_of.items():
            yield from (kernel.case(num_experts, dtype) for num_experts in sizes)
    for kernel in _other_branches():
        yield kernel.case(256, torch.float32)
