"""moe_routing: the experts of each token and their weights, from the router logits.

The natural experts of a token are the K with the largest selection scores. Replayed experts were recorded earlier.
With x the logits of a token, s_j = softmax(x)_j or sigmoid(x_j), and C its K experts:
    weight_i = scale s_i / sum_{j in C} s_j   (norm_topk_prob=True: for softmax, the softmax over the K gathered logits)
    weight_i = scale s_i                      (norm_topk_prob=False: for softmax, the gradient reaches all E logits)
Replay fixes the experts alone: their weights and gradients are computed from the logits of this call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...common.checks import check_float_matrix, check_integers, check_like, check_tensor
from ...common.library import Op
from .checks import checked_routed_experts
from .reference import moe_routing_reference

OP = Op(__package__)
MAX_EXPERTS = 4096  # the kernels keep a whole row on the stack or in registers


class Routing(NamedTuple):
    """The experts of T tokens, their weights, and measures of the replay. Only weights have a gradient.

    weights: [T, K] float32.
    experts: [T, K] int64, in the order of weights: as replayed, or by descending selection score.
    natural_experts: [T, K] int64, by descending selection score; of equal scores, the lower id comes first.
    agreement: [T] float32, the fraction of the K experts that are also natural experts.
    mass: [T] float32, sum of s over the K experts / sum of s over all E experts.
    margin: [T] float32, the K-th minus the (K+1)-th largest selection score; inf if there is no (K+1)-th.
    """

    weights: Tensor
    experts: Tensor
    natural_experts: Tensor
    agreement: Tensor
    mass: Tensor
    margin: Tensor


def moe_routing(
    router_logits: Tensor,
    top_k: int,
    *,
    routed_experts: Tensor | None = None,
    valid: Tensor | None = None,
    norm_topk_prob: bool = True,
    scoring: str = "softmax",
    correction_bias: Tensor | None = None,
    num_groups: int | None = None,
    top_k_groups: int | None = None,
    scale: float = 1.0,
    check: bool = False,
    backend: str = "auto",
) -> Routing:
    """Route each token to its natural experts, or to the experts in `routed_experts`, by the same arithmetic.

    router_logits: [T, E], float32, bfloat16 or float16, last dimension contiguous, E at most 4096.
    top_k: K, from 1 to E; with groups, at most the number of experts in the kept groups.
    routed_experts: [T, K] integers of any width; the experts to replay. Their order is kept. A row is bad if it has an
        id out of range, or an id twice. On the CPU a bad row raises ValueError. On a GPU the weights, agreement and
        mass of a bad row are NaN, and its experts are the natural ones.
    valid: [T] bool; a row with False is routed naturally, and its routed_experts are ignored.
    norm_topk_prob: whether the weights of a token sum to scale. With K = 1 the router then gets no gradient.
    scoring: "softmax" or "sigmoid".
    correction_bias: [E], floating point; added to s for the selection alone.
    num_groups, top_k_groups: the experts form num_groups equal groups, of which top_k_groups are kept: the groups with
        the largest sums of their two largest selection scores (DeepSeek-V3, arXiv 2412.19437). Give both or neither.
    scale: factor of the weights, above 0.
    check: whether a bad row raises ValueError on a GPU too. The check waits for the device.
    Returns Routing.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The selection score is the logit; with a correction_bias or groups it is s_j + bias_j. NaN ranks above every number.
    A row whose scores have no finite sum, for example with a NaN logit, has NaN weights. No row affects another row.
    The natural experts of some logits, replayed with the same logits, give the bits of the natural weights.
    """
    num_experts = _check_logits(router_logits, top_k)
    groups = _check_groups(num_experts, top_k, num_groups, top_k_groups)
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring is {scoring!r}: it must be 'softmax' or 'sigmoid'")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {scale!r}: it must be a number")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}: it must be above 0 and finite")
    if correction_bias is not None:
        check_tensor("correction_bias", correction_bias)
        if not correction_bias.is_floating_point():
            raise TypeError(f"correction_bias has dtype {correction_bias.dtype}: it must be a floating point tensor")
        check_like("correction_bias", correction_bias, torch.Size([num_experts]), router_logits.device)
        correction_bias = correction_bias.detach().float().contiguous()
    routed_experts, valid = _check_replay(router_logits, top_k, routed_experts, valid)
    backend = OP.resolve(backend, router_logits.device)
    if routed_experts is not None and (check or (backend == "reference" and router_logits.device.type == "cpu")):
        routed_experts = checked_routed_experts(routed_experts, valid, num_experts)
    options = (norm_topk_prob, scoring, correction_bias, *groups, float(scale))
    if backend == "reference":
        return Routing(*moe_routing_reference(router_logits, top_k, routed_experts, valid, *options))
    arguments = (top_k, routed_experts, valid, *options, backend)
    if torch.is_grad_enabled() and router_logits.requires_grad:
        weights, experts, agreement, mass, margin, *natural = _MoERouting.apply(router_logits, arguments)
    else:
        weights, experts, agreement, mass, margin, natural = moe_routing_forward(router_logits, *arguments)
    return Routing(weights, experts, natural[0] if natural else experts, agreement, mass, margin)


def _check_logits(router_logits, top_k) -> int:
    check_float_matrix("router_logits", router_logits)
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits has shape {tuple(router_logits.shape)}: it must be [T, E]")
    num_experts = router_logits.shape[1]
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"router_logits has {num_experts} experts: it must have at most {MAX_EXPERTS}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k is {top_k!r}: it must be an integer")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}: it must be from 1 to the number of experts, {num_experts}")
    return num_experts


def _check_groups(num_experts, top_k, num_groups, top_k_groups) -> tuple[int, int]:
    """(number of groups, number of groups to keep); (1, 1) without groups, or for one group."""
    if (num_groups is None) != (top_k_groups is None):
        raise ValueError(f"num_groups is {num_groups} and top_k_groups {top_k_groups}: both or neither must be given")
    if num_groups is None or num_groups == top_k_groups == 1:
        return 1, 1
    if num_groups < 1 or num_experts % num_groups or num_experts // num_groups < 2:
        raise ValueError(
            f"num_groups is {num_groups}: it must divide the {num_experts} experts into groups of two or more"
        )
    if not 1 <= top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups is {top_k_groups}: it must be from 1 to num_groups, {num_groups}")
    candidates = num_experts // num_groups * top_k_groups
    if top_k > candidates:
        raise ValueError(f"top_k is {top_k}: it must be at most the {candidates} experts of the kept groups")
    return num_groups, top_k_groups


def _check_replay(router_logits, top_k, routed_experts, valid) -> tuple[Tensor | None, Tensor | None]:
    if routed_experts is None:
        if valid is not None:
            raise ValueError("valid is given without routed_experts: it must then be None")
        return None, None
    tokens = router_logits.shape[0]
    check_integers("routed_experts", routed_experts)
    check_like("routed_experts", routed_experts, torch.Size([tokens, top_k]), router_logits.device)
    if routed_experts.stride(1) != 1:  # a column of its own is contiguous to torch with any stride
        routed_experts = routed_experts.clone(memory_format=torch.contiguous_format)
    if valid is not None:
        check_tensor("valid", valid)
        if valid.dtype != torch.bool:
            raise TypeError(f"valid has dtype {valid.dtype}: it must be bool")
        check_like("valid", valid, torch.Size([tokens]), router_logits.device)
    return routed_experts, valid


class _MoERouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, router_logits, arguments):  # a tuple, because autograd looks at each of its inputs
        weights, experts, *measures, natural = moe_routing_forward(router_logits, *arguments)
        ctx.save_for_backward(router_logits, weights, experts)
        _, _, _, norm_topk_prob, scoring, *_, scale, backend = arguments
        ctx.options = (norm_topk_prob, scoring, scale, backend)
        ctx.mark_non_differentiable(experts, *measures, *natural)
        ctx.set_materialize_grads(False)
        return weights, experts, *measures, *natural

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, *_):
        if grad_weights is None:
            return None, None
        router_logits, weights, experts = ctx.saved_tensors
        return moe_routing_backward(router_logits, weights, experts, grad_weights.contiguous(), *ctx.options), None


def _forward(kernels, router_logits, top_k, routed_experts, valid, *options):
    return kernels.forward(router_logits, top_k, routed_experts, valid, *options)


def _forward_fake(router_logits, top_k, routed_experts, *_):
    tokens = router_logits.shape[0]
    weights = router_logits.new_empty((tokens, top_k), dtype=torch.float32)
    experts = torch.empty_like(weights, dtype=torch.int64)
    natural = [] if routed_experts is None else [torch.empty_like(experts)]
    return weights, experts, *(weights.new_empty(tokens) for _ in range(3)), natural


def _backward(kernels, router_logits, weights, experts, grad_weights, norm_topk_prob, scoring, scale):
    out = torch.empty_like(router_logits, memory_format=torch.contiguous_format)
    kernels.backward(router_logits, weights, experts, grad_weights, norm_topk_prob, scoring, scale, out)
    return out


def _backward_fake(router_logits, *_):
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


moe_routing_forward = OP.define(
    "moe_routing(Tensor router_logits, SymInt top_k, Tensor? routed_experts, Tensor? valid, bool norm_topk_prob, "
    "str scoring, Tensor? correction_bias, SymInt num_groups, SymInt top_k_groups, float scale, str backend) -> "
    "(Tensor weights, Tensor experts, Tensor agreement, Tensor mass, Tensor margin, Tensor[] natural_experts)",
    _forward,
    _forward_fake,
)
moe_routing_backward = OP.define(
    "moe_routing_backward(Tensor router_logits, Tensor weights, Tensor experts, Tensor grad_weights, "
    "bool norm_topk_prob, str scoring, float scale, str backend) -> Tensor",
    _backward,
    _backward_fake,
)
