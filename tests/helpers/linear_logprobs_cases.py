"""Options of linear_token_logprobs, and its check against float64, for any backend."""

from __future__ import annotations

import equations
import torch
from equations import upstream
from linear_head import assert_matrices_as_exact, logits

from minirl_kernels import linear_token_logprobs

OPTIONS = {
    "plain": {},
    "bias": {"with_bias": True},
    "temperature": {"temperature": 0.7},
    "each": {"temperature": torch.tensor([0.4, 1.0, 0.7, 3.0, 1.3, 0.9, 1.1])},
    "softcap": {"logit_softcap": 3.0},
    "scale": {"logit_scale": 0.6},
    "all": {"with_bias": True, "temperature": 0.8, "logit_softcap": 4.0, "logit_scale": 1.5},
}


def call(hidden, weight, token_ids, bias, backend, with_entropy=True, device="cpu", **options):
    """[log_probs, entropy, d hidden, d weight] and, with a bias, d bias."""
    leaves = [x.detach().to(device).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    options.update({} if bias is None else {"bias": leaves[2]})
    outs = linear_token_logprobs(*leaves[:2], token_ids.to(device), with_entropy=True, backend=backend, **options)
    count = 2 if with_entropy else 1
    grads = torch.autograd.grad(outs[:count], leaves, [values.to(device) for values in upstream(token_ids)[:count]])
    return [values.detach().cpu() for values in (*outs, *grads)]


def by_equations(hidden, weight, token_ids, bias, dtype, *, temperature=1.0, logit_softcap=None, logit_scale=1.0):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    if dtype == torch.float64:
        leaves = [x.detach().double().requires_grad_() for x in leaves]
    x = logits(*leaves[:2], leaves[2] if bias is not None else None, dtype, softcap=logit_softcap, scale=logit_scale)
    return equations.token_log_probs_and_gradients(leaves, x, token_ids, temperature)


def check_against_equations(head, backend, device="cpu", **options):
    ours = call(*head, backend, device=device, **options)
    exact, eager = (by_equations(*head, dtype, **options) for dtype in (torch.float64, torch.float32))
    for result, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_matrices_as_exact(result, theirs, truth)
