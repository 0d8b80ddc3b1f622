"""Sets of kept tokens of every kind, their equations, and checks of them for any backend."""

from __future__ import annotations

import equations
import torch
from equations import upstream
from linear_head import assert_matrices_as_exact, random_head
from linear_head import logits as head_logits
from policy_batches import assert_as_exact_as_eager, per_row

from minirl_kernels import SamplingMask, linear_token_logprobs, token_logprobs


def random_sets(token_ids, vocab_size, seed=0):
    """One set for each position, which contains the position's token.

    The kinds alternate: None (the whole vocabulary), the token alone, a few tokens, many tokens, all tokens by name.
    With a large vocabulary "many" and "all" are hundreds of tokens, because the interpreter is slow.
    """
    many, all_tokens = (max(vocab_size // 2, 1), vocab_size) if vocab_size <= 5000 else (500, 300)
    gen = torch.Generator().manual_seed(seed)
    sets = []
    for number, token in enumerate(token_ids.flatten().tolist()):
        size = (None, 1, min(5, vocab_size), many, all_tokens)[number % 5]
        if size is None:
            sets.append(None)
            continue
        others = [other for other in torch.randperm(vocab_size, generator=gen).tolist() if other != token]
        sets.append([*others[: size - 1], token] if token >= 0 else others[:size])
    return sets


def mask_of(sets, shape):
    flat = SamplingMask.from_sets(sets)
    return SamplingMask(flat.token_ids, flat.offsets, tuple(shape))


def random_mask(token_ids, vocab_size, seed=0):
    return mask_of(random_sets(token_ids, vocab_size, seed), token_ids.shape)


def kept_log_probs(logits, token_ids, sets, temperature=1.0):
    """(log-probability, entropy) [T] of logits [T, V], computed from the kept logits of each row only."""
    temperature = torch.as_tensor(temperature, dtype=logits.dtype).expand(token_ids.shape)
    results = []
    for row, token, one, heat in zip(logits, token_ids.tolist(), sets, temperature, strict=True):
        ids = list(range(len(row))) if one is None else one
        target = torch.tensor([ids.index(token) if token >= 0 else -100])
        results.append(torch.cat(equations.token_log_probs(row[ids][None], target, heat)))
    return tuple(torch.stack(results).unbind(1)) if results else (logits.sum(-1), logits.sum(-1))


def forward_backward(logits, token_ids, kept, backend, device="cpu", **options):
    """(log_probs, entropy, gradient of the logits) under gradients of both results that differ from token to token."""
    leaf = _on(logits.detach(), device).requires_grad_()
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    kept = None if kept is None else kept.to(device)
    outs = token_logprobs(leaf, token_ids.to(device), kept=kept, with_entropy=True, backend=backend, **options)
    (grad,) = torch.autograd.grad(outs, leaf, [values.to(device) for values in upstream(token_ids)])
    return [values.detach().cpu() for values in (*outs, grad)]


def _on(logits, device):
    return logits if device == "cpu" else logits.to(device)


def check_token_logprobs(logits, token_ids, backend, temperature=1.0, device="cpu"):
    """Values and gradient are as exact as eager's against float64; outside of the sets the gradient is exactly 0."""
    vocab_size, sets = logits.shape[-1], random_sets(token_ids, logits.shape[-1])
    kept = mask_of(sets, token_ids.shape)
    ours = forward_backward(logits, token_ids, kept, backend, device=device, temperature=temperature)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = logits.detach().to(dtype if dtype == torch.float64 else logits.dtype).requires_grad_()
        heat = temperature.flatten() if isinstance(temperature, torch.Tensor) else temperature
        rows = leaf.to(dtype).reshape(-1, vocab_size)
        outs = [values.view(token_ids.shape) for values in kept_log_probs(rows, token_ids.flatten(), sets, heat)]
        grads = torch.autograd.grad(outs, leaf, [values.to(dtype) for values in upstream(token_ids)])
        results.append([values.detach() for values in (*outs, *grads)])
    for result, truth, eager in zip(ours, *results, strict=True):
        assert_as_exact_as_eager(result, eager, truth, per_row(truth) if truth.shape == logits.shape else None)
    for row, one in zip(ours[2].reshape(-1, vocab_size), sets, strict=True):
        outside = torch.ones(vocab_size, dtype=torch.bool)
        outside[slice(None) if one is None else one] = False
        assert not row[outside].any()


def check_linear(head, backend, device="cpu", *, temperature=1.0, logit_softcap=None, logit_scale=1.0):
    """Values of linear_token_logprobs, and its gradients by hidden states, weight and bias."""
    hidden, weight, token_ids, bias = head
    sets = random_sets(token_ids, len(weight))
    options = {"temperature": temperature, "logit_softcap": logit_softcap, "logit_scale": logit_scale}
    ours = call_linear(head, mask_of(sets, token_ids.shape), backend, device, **options)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [x.detach() for x in (hidden, weight, bias) if x is not None]
        leaves = [(x.double() if dtype == torch.float64 else x).clone().requires_grad_() for x in leaves]
        x = head_logits(
            *leaves[:2], None if bias is None else leaves[2], dtype, softcap=logit_softcap, scale=logit_scale
        )
        outs = kept_log_probs(x, token_ids, sets, temperature)
        grads = torch.autograd.grad(outs, leaves, [values.to(dtype) for values in upstream(token_ids)])
        results.append([values.detach() for values in (*outs, *grads)])
    for result, truth, eager in zip(ours, *results, strict=True):
        assert_matrices_as_exact(result, eager, truth)


def call_linear(head, kept, backend, device="cpu", **options):
    """[log_probs, entropy, d hidden, d weight] and, with a bias, d bias."""
    *operands, token_ids, bias = head
    leaves = [x.detach().to(device).requires_grad_() for x in (*operands, bias) if x is not None]
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    outs = linear_token_logprobs(
        *leaves[:2],
        token_ids.to(device),
        bias=None if bias is None else leaves[2],
        kept=None if kept is None else kept.to(device),
        with_entropy=True,
        backend=backend,
        **options,
    )
    grads = torch.autograd.grad(outs, leaves, [values.to(device) for values in upstream(token_ids)])
    return [values.detach().cpu() for values in (*outs, *grads)]


def check_head_outside_of_the_sets(backend):
    """The gradient of a head's row is exactly 0 if no position kept its token, with a softcap too."""
    head = random_head(4, 12, 50, with_bias=True)
    sets = [[int(token), 3, 4] if int(token) not in (3, 4) else [3, 4] for token in head[2]]
    for options in ({}, {"logit_softcap": 2.0}):
        *_, grad_weight, grad_bias = call_linear(head, SamplingMask.from_sets(sets), backend, **options)
        outside = torch.ones(50, dtype=torch.bool)
        outside[[token for one in sets for token in one]] = False
        assert not grad_weight[outside].any()
        assert not grad_bias[outside].any()
        assert grad_weight[~outside].any()
