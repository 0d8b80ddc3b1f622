"""CPU backend of moe_routing: allocates the results and calls the native kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import native
from .checks import routed_experts_message

# the native kernel reads these; other integer dtypes are cast to int64
_ID_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)


class _Options(NamedTuple):
    """The options of the native kernels, which read the fields by name."""

    top_k: int
    normalize: bool
    sigmoid: bool
    scale: float
    num_groups: int = 1
    top_k_groups: int = 1


def forward(
    router_logits: Tensor,
    top_k: int,
    routed_experts: Tensor | None,
    valid: Tensor | None,
    norm_topk_prob: bool,
    scoring: str,
    correction_bias: Tensor | None,
    num_groups: int,
    top_k_groups: int,
    scale: float,
) -> tuple[Tensor | list[Tensor], ...]:
    """(weights, experts, agreement, mass, margin, [natural_experts]); [] without routed_experts."""
    tokens = router_logits.shape[0]
    weights = torch.empty(tokens, top_k, dtype=torch.float32)
    experts = torch.empty(tokens, top_k, dtype=torch.int64)
    natural = [] if routed_experts is None else [torch.empty_like(experts)]
    agreement = torch.empty(tokens, dtype=torch.float32)
    mass, margin = torch.empty_like(agreement), torch.empty_like(agreement)
    ids = routed_experts
    if ids is not None and ids.dtype not in _ID_DTYPES:
        ids = ids.long()
    if valid is not None:
        valid = valid.contiguous()
    options = _Options(top_k, norm_topk_prob, scoring == "sigmoid", scale, num_groups, top_k_groups)
    results = (weights, experts, natural[0] if natural else experts.new_empty(0), agreement, mass, margin)
    bad_row = native().moe_routing(router_logits, correction_bias, ids, valid, options, *results)
    if bad_row >= 0:
        raise ValueError(routed_experts_message(bad_row, routed_experts, router_logits.shape[1]))
    return weights, experts, agreement, mass, margin, natural


def backward(
    router_logits: Tensor,
    weights: Tensor,
    experts: Tensor,
    grad_weights: Tensor,
    norm_topk_prob: bool,
    scoring: str,
    scale: float,
    out: Tensor,
) -> None:
    """Writes d router_logits into `out`."""
    options = _Options(experts.shape[1], norm_topk_prob, scoring == "sigmoid", scale)
    native().moe_routing_backward(router_logits, options, weights, experts, grad_weights, out)
