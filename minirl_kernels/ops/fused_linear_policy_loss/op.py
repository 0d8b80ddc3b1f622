"""fused_linear_policy_loss: hidden states in; loss, metrics and the gradients of hidden states and head out.

Three matmuls and no [T, V]: for some hundreds of rows at a time the logits, then c_t of `fused_policy_loss` and the
gradient of the logits in their place, then what that adds to the two gradients. Where a token's c_t depends on other
tokens, and where the vocabulary is sharded, `linear_token_logprobs` runs forward and backward: a fourth matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.autograd import attach_gradient_once
from ...common.checks import IGNORE_INDEX, always_looks
from ...common.library import Op, register
from ...common.records import schema, unpack
from ...config import PolicyLossConfig
from ...sampling_mask import SamplingMask
from ..fused_policy_loss.loss_rows import LossRows
from ..fused_policy_loss.op import SWEEP_RESULTS, takes_one_sweep
from ..linear_token_logprobs.head import Head, HeadRows, Needs, prepare_head
from ..linear_token_logprobs.op import GRADIENT_RESULTS, gradients_fake, linear_gradients, linear_stats
from ..policy_loss.inputs import PolicyLossInputs, prepare_inputs
from ..policy_loss.op import PolicyLossOutput, assemble_output, differentiable_loss, loss_of_log_probs
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
    check: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """`fused_policy_loss` of the logits that a linear head would give, [T, V] of which never exist at once.

    hidden: [B, L, H] (padded, rows are responses) or [T, H] (packed with cu_seqlens); float32, bfloat16 or float16.
        hidden[t] scores token_ids[t]: nothing is shifted.
    weight, bias, logit_softcap, logit_scale, process_group: those of `linear_token_logprobs`; temperature too.
    kept: that of `linear_token_logprobs`; rollout_log_probs and old_log_probs must then be over the same sets.
    token_ids: [B, L] or [T], int32 or int64; -100 takes the token out of the loss, as loss_mask = 0 does. The rows
        of such tokens are not computed. An id out of range raises ValueError on the CPU, gives NaN on the GPU, and
        raises there too with check=True, which waits for it.
    The others are those of `policy_loss`, inputs and check too; with check a GPU looks at temperature as well.

    Returns PolicyLossOutput; entropy is exact over the vocabulary, or over kept. All gradients are made in the forward,
    for those of hidden, weight and bias that require one; the first backward consumes them and a second one raises
    RuntimeError. That of weight is summed over tokens in float32. Rows whose c_t is 0 are left out of the matmuls of
    the gradients; on a GPU those of advantage 0, without KL or entropy term, and others that are 0 add exact zeros.
    There the host waits once, for the number of rows.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    """
    head = prepare_head(hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, process_group, kept)
    backend = OP.resolve(backend, hidden.device)
    check = check or always_looks(hidden.device, backend)
    inputs = prepare_inputs(
        token_ids.shape,
        hidden.device,
        inputs=inputs,
        old_log_probs=old_log_probs,
        rollout_log_probs=rollout_log_probs,
        advantages=advantages,
        loss_mask=loss_mask,
        ignored=token_ids == IGNORE_INDEX,
        cu_seqlens=cu_seqlens,
        group_ids=group_ids,
        ref_log_probs=ref_log_probs,
        num_responses=num_responses,
        num_tokens=num_tokens,
        num_groups=num_groups,
        config=config,
        raises=check,
    )
    token_ids = token_ids.masked_fill(~inputs.mask, IGNORE_INDEX).contiguous()
    token_ids = head.check_contents(token_ids, check, backend)
    if backend == "reference":
        options = {"temperature": head.temperature, "kept": kept, "with_entropy": True}
        log_probs, entropy = token_logprobs(head.logits(), token_ids, **options, backend=backend)
        return differentiable_loss(log_probs, entropy, inputs, entropy.detach())
    operands = (head.hidden, head.weight, head.bias)
    needs = Needs(*(operand is not None and operand.requires_grad and torch.is_grad_enabled() for operand in operands))
    one_sweep = any(needs) and head.shard is None and takes_one_sweep(inputs)
    sweep = _one_sweep if one_sweep else _two_phases
    with torch.no_grad():
        output, grads = sweep(head, token_ids, inputs, needs, backend)
    pairs = [(operand, grad) for operand, grad, needed in zip(operands, grads, needs, strict=True) if needed]
    if not pairs:
        return output
    return output._replace(loss=attach_gradient_once(output.loss, pairs, "fused_linear_policy_loss"))


def _one_sweep(head: Head, token_ids: Tensor, inputs: PolicyLossInputs, needs: Needs, backend: str):
    rows, loss = head.rows(token_ids).detached(), LossRows.of(inputs).flat()
    *per_token, grad_hidden, grad_weight, grad_bias = fused_linear_policy_loss_forward(*rows, *loss, *needs, backend)
    output = assemble_output(*(values.view(token_ids.shape) for values in per_token), inputs)
    return output, (grad_hidden.view(head.hidden.shape) if needs.needs_hidden else None, grad_weight, grad_bias)


def _two_phases(head: Head, token_ids: Tensor, inputs: PolicyLossInputs, needs: Needs, backend: str):
    rows = head.rows(token_ids).detached()
    log_probs, entropy, shift, log_sum = linear_stats(rows, True, head.shard, backend)
    output = loss_of_log_probs(log_probs.view(token_ids.shape), entropy.view(token_ids.shape), inputs)
    if not any(needs):
        return output, (None, None, None)
    entropy_grad = None if inputs.entropy_grad is None else inputs.entropy_grad.flatten()
    gradients = RowGradients(shift, log_sum, entropy, output.token_grad.flatten(), entropy_grad)
    grad_hidden, *others = linear_gradients(rows, gradients, needs, head.shard, backend)
    return output, (grad_hidden.view(head.hidden.shape) if needs.needs_hidden else None, *others)


_kernels = OP.kernels


def _forward(*arguments):
    head, loss, needs, backend = unpack(arguments, HeadRows, LossRows, Needs)
    return tiles.forward_backward(_kernels(backend), head, loss, needs)


def _forward_fake(hidden, weight, bias, token_ids, *arguments):
    per_token = (hidden.new_empty(token_ids.shape, dtype=torch.float32) for _ in range(4))
    return *per_token, *gradients_fake(hidden, weight, *arguments[-4:-1])


fused_linear_policy_loss_forward = register(
    f"fused_linear_policy_loss({schema(HeadRows, LossRows, Needs)}, str backend)"
    f" -> ({SWEEP_RESULTS}, {GRADIENT_RESULTS})",
    _forward,
    _forward_fake,
    waits=True,
)
