"""fused_policy_loss: logits in; loss, metrics and the gradient of the logits out, in one sweep over the logits.

The kernels need two numbers per token, c_t = d loss / d log pi(t) and e_t = d loss / d H_t:
    d loss / d logits = (c_t (onehot_y - p) - e_t p (log p + H)) / temperature
`ops/policy_loss/reference.py` defines them; kernels evaluate the token-level objectives themselves, between reading
a row and writing its gradient. Where a token's c_t depends on the other tokens of its response, the same pieces
run in two phases: log-probabilities, then c_t in torch, then the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.autograd import attach_gradient_once
from ...common.checks import (
    IGNORE_INDEX,
    always_looks,
    check_contents,
    check_float_matrix,
    check_rows_apart,
    check_token_ids,
    per_token_temperature,
)
from ...common.library import Op, register
from ...common.records import schema, unpack
from ...config import PolicyLossConfig
from ...sampling_mask import SamplingMask
from ..kept_logits.op import check_kept, kept_logits, kept_logits_in_place
from ..policy_loss.inputs import PolicyLossInputs, prepare_inputs
from ..policy_loss.op import PolicyLossOutput, assemble_output, differentiable_loss, loss_of_log_probs
from ..policy_loss.overflow import raise_overflow
from ..policy_loss.two_forms import takes_inputs
from ..token_logprobs.op import (
    token_logprobs,
    token_logprobs_backward,
    token_logprobs_backward_in_place,
    token_logprobs_forward,
)
from ..token_logprobs.rows import LogitRows, RowGradients
from .loss_rows import LossRows
from .objective_kernels import has_kernel

OP = Op(__package__)


@takes_inputs
def fused_policy_loss(
    logits: Tensor,
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
    temperature: float | Tensor = 1.0,
    kept: SamplingMask | None = None,
    overwrite_logits: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """`policy_loss` straight from logits: the loss and its gradient by the logits, made together.

    logits: [B, L, V] (padded, rows are responses) or [T, V] (packed with cu_seqlens); float32, bfloat16 or float16;
        any outer strides, last dimension contiguous. logits[t] scores token_ids[t]: nothing is shifted; hand in
        whole logits with -100 rather than a slice, whose gradient costs a pass.
    token_ids: [B, L] or [T], int32 or int64; -100 takes the token out of the loss, as loss_mask = 0 does. The rows
        of such tokens are not read: their log-probability, entropy and gradient are 0. An id out of range raises
        ValueError on the CPU, gives NaN on the GPU, and raises there too with check=True, which waits for it.
    temperature: divides the logits; above 0, a number or one float per token.
    kept: that of `token_logprobs`; rollout_log_probs and old_log_probs must then be over the same sets. It costs a
        copy of the logits, which becomes their gradient, or one pass where they are overwritten. An overflow that
        raises then leaves -inf in the logits outside of the sets.
    overwrite_logits: put the gradient where the logits were. They are lost to every other reader (autograd notices);
        no two rows may share memory. The reference keeps them.
    The others are those of `policy_loss`, inputs and check too; with check a GPU looks at temperature as well.
        No gradient is made where logits does not require one.

    Returns PolicyLossOutput; entropy is exact over the vocabulary, or over kept. The gradient is made in the forward,
    so the first backward consumes it and a second one raises RuntimeError. It has the dtype of the logits before the
    backward's own factor is applied: in float16, scale with num_responses rather than with a loss scaler.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing; the logits
    are as they were then. A NaN among them is no error: it is NaN in the results of its token.
    """
    check_float_matrix("logits", logits)
    if overwrite_logits:
        check_rows_apart("logits", logits)
    check_token_ids(token_ids, logits.shape[:-1], logits.device)
    temperature = per_token_temperature(temperature, token_ids.shape, logits.device)
    backend = OP.resolve(backend, logits.device)
    check = check or always_looks(logits.device, backend)
    inputs = prepare_inputs(
        token_ids.shape,
        logits.device,
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
    if check:
        token_ids = check_contents(token_ids, logits.shape[-1], temperature)
    token_ids, *sets = check_kept(kept, token_ids, logits.shape[-1], check, backend)
    if backend == "reference":
        options = {"temperature": temperature, "kept": kept, "with_entropy": True}
        log_probs, entropy = token_logprobs(logits, token_ids, **options, backend=backend)
        return differentiable_loss(log_probs, entropy, inputs, entropy.detach())
    needs_gradient = logits.requires_grad and torch.is_grad_enabled()
    in_place, source = overwrite_logits and needs_gradient, logits.detach()
    if kept is not None and in_place:
        kept_logits_in_place(source, *sets, backend)
    elif kept is not None:
        source, in_place = kept_logits(source, *sets, backend), True
    rows = LogitRows(source, token_ids, temperature.contiguous())
    if not needs_gradient:
        log_probs, entropy, *_ = token_logprobs_forward(*rows, True, backend)
        return loss_of_log_probs(log_probs, entropy, inputs)
    # the kernels of a GPU cannot say before they overwrite a row that another one will overflow
    says_too_late = check and overwrite_logits and backend == "triton"
    sweep = _one_sweep if takes_one_sweep(inputs) and not says_too_late else _two_phases
    with torch.no_grad():
        output, grad_logits = sweep(rows, inputs, in_place, backend)
    loss = attach_gradient_once(output.loss, [(logits, grad_logits)], "fused_policy_loss")
    return output._replace(loss=loss)


def takes_one_sweep(inputs: PolicyLossInputs) -> bool:
    """Whether a token's loss is known from its own row: else log-probabilities first, then the gradient."""
    config = inputs.config
    # another correction than d itself may look at the whole response, so d must be known before the sweep
    d_is_known = config.rollout_is in ("token", None) or inputs.old_log_probs is not None
    return has_kernel(config.policy_objective) and d_is_known


def _one_sweep(rows: LogitRows, inputs: PolicyLossInputs, in_place: bool, backend: str):
    loss = LossRows.of(inputs)
    if in_place:
        logits, *others = (*rows, *loss)
        results = fused_policy_loss_in_place(logits, inputs.layout.offsets, *others, backend)
        return assemble_output(*results, inputs), logits
    *results, grad_logits = fused_policy_loss_forward(*rows, *loss, backend)
    return assemble_output(*results, inputs), grad_logits


def _two_phases(rows: LogitRows, inputs: PolicyLossInputs, in_place: bool, backend: str):
    log_probs, entropy, shift, log_sum = token_logprobs_forward(*rows, True, backend)
    output = loss_of_log_probs(log_probs, entropy, inputs)
    gradients = RowGradients(shift, log_sum, entropy, output.token_grad, inputs.entropy_grad)
    if in_place:
        token_logprobs_backward_in_place(*rows, *gradients, backend)
        return output, rows.logits
    return output, token_logprobs_backward(*rows, *gradients, backend)


_kernels = OP.kernels


def _forward(*arguments):
    rows, loss, backend = unpack(arguments, LogitRows, LossRows)
    out = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    return *_kernels(backend).forward_backward(rows, loss, out), out


def _forward_in_place(logits, offsets, *arguments):
    rows, loss, backend = unpack((logits, *arguments), LogitRows, LossRows)
    if backend == "cpu":
        _check_before_overwriting(rows, loss, offsets, backend)
    torch.autograd.graph.increment_version(logits)  # whoever saved the logits for a backward learns of it
    return _kernels(backend).forward_backward(rows, loss, logits)


def _check_before_overwriting(rows: LogitRows, loss: LossRows, offsets: Tensor, backend: str) -> None:
    log_probs, _, token_loss, token_grad = _kernels(backend).forward_backward(
        rows, loss, rows.logits, only_overflow=True
    )
    old = log_probs if loss.old_log_probs is None else loss.old_log_probs
    behaviour = old if loss.behaviour_log_probs is None else loss.behaviour_log_probs
    log_ref = None if loss.ref_log_probs is None else loss.ref_log_probs - log_probs
    ratios = (log_probs, log_probs - old, log_probs - behaviour, log_ref)
    raise_overflow(token_loss, token_grad, *ratios, loss.advantages, offsets)


def _forward_in_place_fake(logits, offsets, token_ids, *_):
    return tuple(logits.new_empty(token_ids.shape, dtype=torch.float32) for _ in range(4))


def _forward_fake(logits, token_ids, *_):
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return *_forward_in_place_fake(logits, None, token_ids), out


_ARGUMENTS = f"{schema(LogitRows, LossRows, skip=1)}, str backend"  # after the logits
SWEEP_RESULTS = "Tensor log_probs, Tensor entropy, Tensor token_loss, Tensor token_grad"
fused_policy_loss_forward = register(
    f"fused_policy_loss(Tensor logits, {_ARGUMENTS}) -> ({SWEEP_RESULTS}, Tensor grad_logits)",
    _forward,
    _forward_fake,
)
fused_policy_loss_in_place = register(
    f"fused_policy_loss_(Tensor(a!) logits, Tensor offsets, {_ARGUMENTS}) -> ({SWEEP_RESULTS})",
    _forward_in_place,
    _forward_in_place_fake,
)
