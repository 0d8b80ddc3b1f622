"""moe_routing on the CPU: allocate, call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .checks import routed_experts_message

# wider ones than these are cast
_ID_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)


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
) -> tuple[Tensor, ...]:
    """The fields of Routing; natural_experts is empty where nothing is replayed: experts are that then."""
    tokens = router_logits.shape[0]
    weights, experts = torch.empty(tokens, top_k), torch.empty(tokens, top_k, dtype=torch.int64)
    natural = experts.new_empty(0) if routed_experts is None else torch.empty_like(experts)
    agreement, mass, margin = (torch.empty(tokens) for _ in range(3))
    ids = routed_experts
    if ids is not None and ids.dtype not in _ID_DTYPES:
        ids = ids.long()
    bad_row = native().moe_routing(
        *_logits_arguments(router_logits, top_k, norm_topk_prob, scoring, scale),
        _address(correction_bias),
        num_groups,
        top_k_groups,
        _address(ids),
        "" if ids is None else str(ids.dtype),
        0 if ids is None else ids.stride(0),
        _address(valid),
        weights.data_ptr(),
        experts.data_ptr(),
        0 if ids is None else natural.data_ptr(),
        agreement.data_ptr(),
        mass.data_ptr(),
        margin.data_ptr(),
    )
    if bad_row >= 0:
        raise ValueError(routed_experts_message(bad_row, routed_experts, router_logits.shape[1]))
    return weights, experts, natural, agreement, mass, margin


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
    """d router_logits into `out`."""
    native().moe_routing_backward(
        *_logits_arguments(router_logits, experts.shape[1], norm_topk_prob, scoring, scale),
        weights.data_ptr(),
        experts.data_ptr(),
        grad_weights.data_ptr(),
        out.data_ptr(),
    )


def _logits_arguments(router_logits, top_k, norm_topk_prob, scoring, scale) -> tuple:
    tokens, num_experts = router_logits.shape
    return (
        router_logits.data_ptr(),
        str(router_logits.dtype),
        tokens,
        num_experts,
        router_logits.stride(0),
        top_k,
        norm_topk_prob,
        scoring == "sigmoid",
        scale,
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
