"""Batches and options of fused_linear_policy_loss, and its check against float64, for any backend."""

from __future__ import annotations

from dataclasses import replace

import equations
import torch
from linear_head import assert_matrices_as_exact, logits, random_head
from policy_batches import LENGTHS, SLACK, random_batch

from minirl_kernels import fused_linear_policy_loss
from minirl_kernels.ops.policy_loss import PolicyLossOutput

TOKENS = sum(LENGTHS)
OPTIONS = {
    "plain": {},
    "bias": {"with_bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"logit_softcap": 3.0},
    "all": {"with_bias": True, "temperature": 0.8, "logit_softcap": 4.0, "logit_scale": 1.5},
}


def head_and_batch(hidden_size, vocab_size, dtype=torch.float32, lengths=LENGTHS, with_bias=False, **options):
    """A random head and a batch; the batch's old and rollout log-probabilities are near the head's."""
    head = random_head(sum(lengths), hidden_size, vocab_size, dtype, with_bias=with_bias)
    return head, batch_of(head, lengths, **options)


def batch_of(head, lengths, *, temperature=1.0, logit_softcap=None, logit_scale=1.0):
    hidden, weight, token_ids, bias = head
    x = logits(hidden, weight, bias, torch.float64, softcap=logit_softcap, scale=logit_scale)
    log_probs = equations.token_log_probs(x, token_ids, temperature)[0].float() if len(x) else torch.zeros(0)
    batch = random_batch(lengths)
    shifts = {name: getattr(batch, name) - batch.log_probs for name in
              ("old_log_probs", "rollout_log_probs", "ref_log_probs")}  # fmt: skip
    return replace(batch, log_probs=log_probs, **{name: log_probs + shift for name, shift in shifts.items()})


def call(head, batch, backend, layout="packed", grad_output=1.0, device="cpu", **options):
    """(output, [d hidden, d weight] and, with a bias, d bias), rows packed."""
    hidden, weight, token_ids, bias = head
    leaves = [batch.lay_out(hidden, layout), weight, *([] if bias is None else [bias])]
    leaves = [leaf.detach().to(device, copy=True).requires_grad_() for leaf in leaves]
    arguments = {
        name: values.to(device) if isinstance(values, torch.Tensor) else values
        for name, values in batch.arguments(layout).items()
    }
    out = fused_linear_policy_loss(
        *leaves[:2],
        batch.lay_out(token_ids, layout).to(device),
        bias=None if bias is None else leaves[2],
        backend=backend,
        **arguments,
        **options,
    )
    grads = [grad.cpu() for grad in torch.autograd.grad(out.loss * grad_output, leaves)]
    return _on_cpu(out), [batch.pack(grads[0], layout), *grads[1:]]


def _on_cpu(out):
    return PolicyLossOutput(*(values.detach().cpu() if isinstance(values, torch.Tensor) else values for values in out))


def by_equations(head, batch, config, dtype, *, temperature=1.0, logit_softcap=None, logit_scale=1.0):
    hidden, weight, token_ids, bias = head
    leaves = [x.detach() for x in (hidden, weight, bias) if x is not None]
    leaves = [(x.double() if dtype == torch.float64 else x).requires_grad_() for x in leaves]
    x = logits(*leaves[:2], leaves[2] if bias is not None else None, dtype, softcap=logit_softcap, scale=logit_scale)
    log_probs, entropy = equations.token_log_probs(x, token_ids, temperature)
    return equations.policy_loss_and_gradients(leaves, log_probs, entropy, batch, config)


def check_against_equations(head, batch, config, backend, device="cpu", **options):
    exact, eager = (by_equations(head, batch, config, dtype, **options) for dtype in (torch.float64, torch.float32))
    for layout in ("packed", "padded"):
        out, grads = call(head, batch, backend, layout, device=device, config=config, **options)
        error, their_error = (abs(values.double() - exact[0]).item() for values in (out.loss.detach(), eager[0]))
        # the loss is a sum of tokens of both signs: its terms cancel, but their rounding errors do not
        assert error <= their_error + SLACK * out.token_loss.abs().sum().item()
        ours = [batch.pack(out.log_probs, layout), batch.pack(out.entropy, layout), *grads]
        for result, theirs, truth in zip(ours, eager[1:], exact[1:], strict=True):
            assert_matrices_as_exact(result, theirs, truth)
