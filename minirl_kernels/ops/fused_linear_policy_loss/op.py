"""fused_linear_policy_loss: hidden states in; loss, metrics and the gradients of hidden states and head out.

It needs three matmuls and no [T, V] tensor. For some hundreds of rows at a time it makes their logits, and then
overwrites them with their gradient by the kernel of `fused_policy_loss`. Two matmuls add this tile to the gradients of
hidden and weight. If the loss cannot take one sweep, or the vocabulary is sharded, `linear_token_logprobs` runs
forward and backward: a fourth matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.autograd import attach_gradient_once
from ...common.checks import always_looks
from ...common.library import Op, register
from ...common.records import schema, unpack
from ...config import PolicyLossConfig
from ...sampling_mask import SamplingMask
from ..fused_policy_loss.loss_rows import LossRows
from ..fused_policy_loss.op import SWEEP_RESULTS, takes_one_sweep
from ..linear_token_logprobs.head import Head, HeadRows, Needs, prepare_head
from ..linear_token_logprobs.op import GRADIENT_RESULTS, gradients_fake, linear_gradients, linear_stats
from ..policy_loss.inputs import PolicyLossInputs, prepare_rows
from ..policy_loss.op import PolicyLossOutput, assemble, differentiable_loss, loss_of_log_probs
from ..policy_loss.two_forms import takes_inputs
from ..token_logprobs.op import token_logprobs
from ..token_logprobs.rows import RowGradients
from . import tiles

OP = Op(__package__)


@takes_inputs
def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    old_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    group_ids: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    num_responses: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_groups: float | Tensor | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),
    inputs: PolicyLossInputs | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    kept: SamplingMask | None = None,
    max_loss_tokens: int | None = None,
    check: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """`policy_loss` from hidden states and a linear head, without a [T, V] tensor of logits.

    weight, bias, temperature, logit_softcap, logit_scale and process_group have the same meaning as in
    `linear_token_logprobs`. The other arguments have the same meaning as in `policy_loss`.

    hidden: [B, L, H] (padded, rows are responses) or [T, H] (packed with cu_seqlens); float32, bfloat16 or float16.
        hidden[t] scores token_ids[t]: the call shifts nothing.
    token_ids: [B, L] or [T], int32 or int64. An id of -100 takes its token out of the loss, like loss_mask = 0, and
        its row is not computed. An id out of range raises ValueError on the CPU and gives NaN on a GPU. With
        check=True it raises on a GPU too.
    kept: the tokens that the sampler kept, the same as in `linear_token_logprobs`. rollout_log_probs and
        old_log_probs must be over the same sets.
    max_loss_tokens: the number of tokens in the loss, or more. On a GPU the host then does not wait for this number,
        if the loss takes one sweep. A number that is too small stops the GPU. All tokens up to this number take part
        in the matmuls of the gradients. None means that the host waits.
    check: the same as in `policy_loss`. On a GPU it checks token_ids and temperature too.
    backend: "auto", "cpu", "triton" or "reference". "auto" follows the device of hidden.

    Returns PolicyLossOutput. The entropy is exact over the vocabulary, or over the kept tokens. The forward computes
        the gradients of hidden, weight and bias, if they require one. The first backward uses them up, and a second
        backward raises RuntimeError. The gradient of weight is summed over tokens in float32.
    Raises ValueError or TypeError that names the argument, and RuntimeError for a missing backend.

    On the CPU, rows with a gradient of 0 are left out of the matmuls of the gradients. On a GPU, rows with advantage 0
    are left out if the loss has no KL and no entropy term; the other rows add exact zeros. On a GPU the host waits
    once, for the number of rows, unless max_loss_tokens is given.
    """
    _check_bound(max_loss_tokens)
    head = prepare_head(hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, process_group, kept)
    backend = OP.resolve(backend, hidden.device)
    check = check or always_looks(hidden.device, backend)
    inputs, token_ids = prepare_rows(
        token_ids.shape,
        hidden.device,
        inputs=inputs,
        old_log_probs=old_log_probs,
        rollout_log_probs=rollout_log_probs,
        advantages=advantages,
        loss_mask=loss_mask,
        token_ids=token_ids,
        cu_seqlens=cu_seqlens,
        group_ids=group_ids,
        ref_log_probs=ref_log_probs,
        num_responses=num_responses,
        num_tokens=num_tokens,
        num_groups=num_groups,
        config=config,
        raises=check,
        backend=backend,
    )
    token_ids = head.check_contents(token_ids, check, backend)
    if backend == "reference":
        options = {"temperature": head.temperature, "kept": kept, "with_entropy": True}
        log_probs, entropy = token_logprobs(head.logits(), token_ids, **options, backend=backend)
        return differentiable_loss(log_probs, entropy, inputs, entropy.detach())
    operands = (head.hidden, head.weight, head.bias)
    needs = Needs(*(operand is not None and operand.requires_grad and torch.is_grad_enabled() for operand in operands))
    one_sweep = any(needs) and head.shard is None and takes_one_sweep(inputs)
    with torch.no_grad():
        if one_sweep:
            values, grads = _one_sweep(head, token_ids, inputs, needs, max_loss_tokens, backend)
        else:
            values, grads = _two_phases(head, token_ids, inputs, needs, backend)
    pairs = [(operand, grad) for operand, grad, needed in zip(operands, grads, needs, strict=True) if needed]
    loss = attach_gradient_once(values.loss, pairs, "fused_linear_policy_loss") if pairs else values.loss
    return values.output(loss)


def _check_bound(max_loss_tokens: int | None) -> None:
    if max_loss_tokens is None:
        return
    if isinstance(max_loss_tokens, bool) or not isinstance(max_loss_tokens, int):
        raise TypeError(f"max_loss_tokens is {max_loss_tokens!r}: it must be an integer, or None")
    if max_loss_tokens < 0:
        raise ValueError(f"max_loss_tokens is {max_loss_tokens}: it must be at least 0, or None")


def _one_sweep(
    head: Head, token_ids: Tensor, inputs: PolicyLossInputs, needs: Needs, max_rows: int | None, backend: str
):
    loss, sums = LossRows.of(inputs)
    *per_token, grad_hidden, grad_weight, grad_bias = fused_linear_policy_loss_forward(
        *head.rows(token_ids).detached(), *loss.flat(), *needs, max_rows, backend
    )
    values = assemble(tuple(results.view(token_ids.shape) for results in per_token), inputs, sums)
    return values, (grad_hidden.view(head.hidden.shape) if needs.needs_hidden else None, grad_weight, grad_bias)


def _two_phases(head: Head, token_ids: Tensor, inputs: PolicyLossInputs, needs: Needs, backend: str):
    rows = head.rows(token_ids).detached()
    log_probs, entropy, shift, log_sum = linear_stats(rows, True, head.shard, backend)
    values = loss_of_log_probs(log_probs.view(token_ids.shape), entropy.view(token_ids.shape), inputs)
    if not any(needs):
        return values, (None, None, None)
    entropy_grad = None if values.entropy_grad is None else values.entropy_grad.flatten()
    gradients = RowGradients(shift, log_sum, entropy, values.token_grad.flatten(), entropy_grad)
    grad_hidden, *others = linear_gradients(rows, gradients, needs, head.shard, backend)
    return values, (grad_hidden.view(head.hidden.shape) if needs.needs_hidden else None, *others)


_kernels = OP.kernels


def _forward(*arguments):
    head, loss, needs, max_rows, backend = unpack(arguments, HeadRows, LossRows, Needs)
    return tiles.forward_backward(_kernels(backend), head, loss, needs, max_rows)


def _forward_fake(hidden, weight, bias, token_ids, *arguments):
    per_token = (hidden.new_empty(token_ids.shape, dtype=torch.float32) for _ in range(4))
    return *per_token, *gradients_fake(hidden, weight, *arguments[-5:-2])


fused_linear_policy_loss_forward = register(
    f"fused_linear_policy_loss({schema(HeadRows, LossRows, Needs)}, SymInt? max_rows, str backend)"
    f" -> ({SWEEP_RESULTS}, {GRADIENT_RESULTS})",
    _forward,
    _forward_fake,
    waits=True,
)
