"""fused_policy_loss: logits in; loss, metrics and the gradient of the logits out, in one sweep over the logits.

The kernels need two numbers per token, c_t = d loss / d log pi(t) and e_t = d loss / d H_t:
    d loss / d logits = (c_t (onehot_y - p) - e_t p (log p + H)) / temperature
`ops/policy_loss/reference.py` defines c_t and e_t. For the objectives of objective_kernels.py the kernels compute c_t
between the reading of a row and the writing of its gradient. All other objectives take two phases: log-probabilities
and c_t first, then the gradient. An objective whose c_t depends on the whole response cannot take one sweep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.autograd import attach_gradient_once
from ...common.checks import (
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
from ..policy_loss.inputs import PolicyLossInputs, prepare_rows
from ..policy_loss.objective_kernels import has_kernel
from ..policy_loss.op import PolicyLossOutput, assemble, differentiable_loss, loss_of_log_probs
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
    """`policy_loss` from logits: computes the loss and the gradient of the logits together.

    The other arguments have the same meaning as in `policy_loss`.

    logits: [B, L, V] (padded, rows are responses) or [T, V] (packed with cu_seqlens); float32, bfloat16 or float16;
        any outer strides, last dimension contiguous. logits[t] scores token_ids[t]: the call shifts nothing. To leave
        out positions, give the whole logits and an id of -100: autograd needs an extra pass for a slice. A NaN in
        the logits is no error: it becomes NaN in the results of its token.
    token_ids: [B, L] or [T], int32 or int64. An id of -100 takes its token out of the loss, like loss_mask = 0. The
        rows of these tokens are not read: their log-probability, entropy and gradient are 0. An id out of range
        raises ValueError on the CPU and gives NaN on a GPU. With check=True it raises on a GPU too.
    temperature: divides the logits. A number or one float per token, above 0.
    kept: the tokens that the sampler kept, the same as in `token_logprobs`. rollout_log_probs and old_log_probs must
        be over the same sets. It costs a copy of the logits, which becomes the gradient. With overwrite_logits it
        costs one pass, and if an overflow raises, the logits outside of the sets are -inf.
    overwrite_logits: write the gradient into the memory of the logits. No other code can then read the logits;
        autograd raises if it needs them. No two rows may share memory. The backend "reference" keeps the logits.
    check: the same as in `policy_loss`. On a GPU it checks token_ids and temperature too.
    backend: "auto", "cpu", "triton" or "reference". "auto" follows the device of logits.

    Returns PolicyLossOutput. The entropy is exact over the vocabulary, or over the kept tokens. If logits requires a
        gradient, the forward computes it. The first backward uses it up, and a second backward raises RuntimeError.
        The gradient has the dtype of the logits before the incoming gradient multiplies it. So in float16 scale the
        loss with num_responses and not with a loss scaler.
    Raises ValueError or TypeError that names the argument, and RuntimeError for a missing backend. The logits are
        then unchanged, except with kept and overwrite_logits.
    """
    check_float_matrix("logits", logits)
    if overwrite_logits:
        check_rows_apart("logits", logits)
    check_token_ids(token_ids, logits.shape[:-1], logits.device)
    temperature = per_token_temperature(temperature, token_ids.shape, logits.device)
    backend = OP.resolve(backend, logits.device)
    check = check or always_looks(logits.device, backend)
    inputs, token_ids = prepare_rows(
        token_ids.shape,
        logits.device,
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
        source, in_place = kept_logits(source, *sets, backend), True  # a copy, which the gradient may overwrite
    rows = LogitRows(source, token_ids, temperature.contiguous())
    if not needs_gradient:
        log_probs, entropy, *_ = token_logprobs_forward(*rows, True, backend)
        values = loss_of_log_probs(log_probs, entropy, inputs)
        return values.output(values.loss)
    # a GPU finds an overflow after the sweep, which has already overwritten the logits; two phases find it before
    would_raise_too_late = check and overwrite_logits and backend == "triton"
    sweep = _one_sweep if takes_one_sweep(inputs) and not would_raise_too_late else _two_phases
    with torch.no_grad():
        values, grad_logits = sweep(rows, inputs, in_place, backend)
    return values.output(attach_gradient_once(values.loss, [(logits, grad_logits)], "fused_policy_loss"))


def takes_one_sweep(inputs: PolicyLossInputs) -> bool:
    """Whether the kernels can compute a token's loss from its row and `inputs`. Otherwise the call takes two phases."""
    config = inputs.config
    # without old_log_probs, d comes from the row: the kernels compute it for one token, but apply no other correction
    d_is_known = config.rollout_is in ("token", None) or inputs.old_log_probs is not None
    return has_kernel(config.policy_objective) and d_is_known


def _one_sweep(rows: LogitRows, inputs: PolicyLossInputs, in_place: bool, backend: str):
    loss, sums = LossRows.of(inputs)
    if in_place:
        logits, *others = (*rows, *loss)
        offsets = inputs.layout.offsets if backend == "cpu" else None
        results = fused_policy_loss_in_place(logits, offsets, *others, backend)
        return assemble(results, inputs, sums), logits
    *results, grad_logits = fused_policy_loss_forward(*rows, *loss, backend)
    return assemble(tuple(results), inputs, sums), grad_logits


def _two_phases(rows: LogitRows, inputs: PolicyLossInputs, in_place: bool, backend: str):
    log_probs, entropy, shift, log_sum = token_logprobs_forward(*rows, True, backend)
    values = loss_of_log_probs(log_probs, entropy, inputs)
    gradients = RowGradients(shift, log_sum, entropy, values.token_grad, values.entropy_grad)
    if in_place:
        token_logprobs_backward_in_place(*rows, *gradients, backend)
        return values, rows.logits
    return values, token_logprobs_backward(*rows, *gradients, backend)


_kernels = OP.kernels


def _forward(*arguments):
    rows, loss, backend = unpack(arguments, LogitRows, LossRows)
    out = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    return *_kernels(backend).forward_backward(rows, loss, out), out


def _forward_in_place(logits, offsets, *arguments):
    rows, loss, backend = unpack((logits, *arguments), LogitRows, LossRows)
    if backend == "cpu":
        _check_before_overwriting(rows, loss, offsets, backend)
    torch.autograd.graph.increment_version(logits)  # so that a backward that saved the logits raises
    return _kernels(backend).forward_backward(rows, loss, logits)


def _check_before_overwriting(rows: LogitRows, loss: LossRows, offsets: Tensor, backend: str) -> None:
    """Raise ValueError for a loss that overflows, while the logits are still unchanged."""
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
    f"fused_policy_loss_(Tensor(a!) logits, Tensor? offsets, {_ARGUMENTS}) -> ({SWEEP_RESULTS})",
    _forward_in_place,
    _forward_in_place_fake,
)
