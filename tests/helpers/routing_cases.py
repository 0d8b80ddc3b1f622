"""Checks of moe_routing's Triton kernels against float64, for the interpreter and a GPU."""

from __future__ import annotations

import itertools

import torch
from policy_batches import assert_as_exact_as_eager, per_row_of_terms

from minirl_kernels import moe_routing
from minirl_kernels.ops.moe_routing.reference import moe_routing_reference

KINDS = list(itertools.product(["softmax", "sigmoid"], [True, False]))


def random_experts(tokens, num_experts, top_k, seed=1):
    return torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :top_k]


def forward_backward(logits, top_k, *, backend="triton", **options):
    """The fields of Routing, and the gradient of the logits under a random gradient of the weights."""
    leaf = logits.detach().requires_grad_()
    routing = moe_routing(leaf, top_k, backend=backend, **options)
    (grad,) = torch.autograd.grad(routing.weights, leaf, _upstream(logits, top_k))
    return routing._replace(weights=routing.weights.detach()), grad


def check_moe_routing(logits, top_k, *, device="cpu", **options):
    """Every field of Routing, and the gradient, are as exact as the reference against float64."""
    logits, options = _on(logits, device), {name: _on(value, device) for name, value in options.items()}
    ours, grad = forward_backward(logits, top_k, **options)
    eager, eager_grad = forward_backward(logits, top_k, backend="reference", **options)
    leaf = logits.detach().double().requires_grad_()
    weights, *others = moe_routing_reference(leaf, top_k, **options)
    upstream = _upstream(logits, top_k)
    (exact_grad,) = torch.autograd.grad(weights, leaf, upstream.double())
    for values, theirs, exact in zip(ours, eager, (weights.detach(), *others), strict=True):
        if values.dtype == torch.int64:
            assert torch.equal(values, exact)
        else:
            finite = exact.isfinite()
            assert torch.equal(values.isfinite(), finite)
            # the margin is a difference of scores, so its error is in units of 1
            scale = torch.ones((), device=device) if values is ours.margin else None
            assert_as_exact_as_eager(values[finite], theirs[finite], exact[finite], scale)
    assert_as_exact_as_eager(grad, eager_grad, exact_grad, per_row_of_terms(weights.detach(), upstream))


def _upstream(logits, top_k):
    return torch.randn(len(logits), top_k, generator=torch.Generator().manual_seed(5)).to(logits.device)


def _on(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value
