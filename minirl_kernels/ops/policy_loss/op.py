"""policy_loss: log-probabilities in; loss and metrics out. Torch defines it, and on a GPU kernels compute it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ...common.autograd import attach_gradient
from ...common.checks import always_looks, check_finite, check_like
from ...config import PolicyLossConfig
from ...objectives import TokenRatios
from .by_kernels import behaviour_by_kernels, ratios_by_kernels, response_sums, sums_by_kernels
from .inputs import PolicyLossInputs, backend_of, prepare_inputs
from .kernel_arguments import CorrectionOptions, LossOptions, ResponseSums, TokenResults, TokenValues
from .layout import ordered_sum
from .metrics import PolicyLossMetrics, collect_metrics
from .objective_kernels import ObjectiveOptions
from .overflow import check_losses
from .reference import behaviour_log_probs, token_losses
from .two_forms import takes_inputs


class PolicyLossOutput(NamedTuple):
    """The result of every policy loss. Only `loss` carries a gradient. Per-token tensors are float32, 0 where masked.

    loss: scalar, float32.
    metrics: sums for the metrics of this call. `metrics.compute()` gives numbers.
    log_probs: [B, L] or [T], log pi_theta of the tokens, in nats.
    entropy: [B, L] or [T], H[pi_theta] at the tokens, in nats. None if `policy_loss` was called without entropy.
    token_loss: [B, L] or [T], the share of each token in the loss. The shares sum to the loss.
    token_grad: [B, L] or [T], c_t = d loss / d log_probs.
    """

    loss: Tensor
    metrics: PolicyLossMetrics
    log_probs: Tensor
    entropy: Tensor | None
    token_loss: Tensor
    token_grad: Tensor


@takes_inputs
def policy_loss(
    log_probs: Tensor,
    *,
    old_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    group_ids: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    num_responses: float | Tensor | None = None,
    num_tokens: float | Tensor | None = None,
    num_groups: float | Tensor | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),
    inputs: PolicyLossInputs | None = None,
    check: bool = False,
) -> PolicyLossOutput:
    """The loss of `config.objective` (MiniRL, Eq. 7, by default) from log-probabilities; see PolicyLossConfig.

    log_probs: [B, L] (padded, rows are responses) or [T] (packed), floating point: log pi_theta of each token, in
        nats. Its gradient is c_t. Values outside the mask are not used.
    old_log_probs: same shape, log pi_old by the training engine. None means the detached log_probs (on policy).
    rollout_log_probs: same shape, log mu_old by the inference engine. May be None if config.rollout_is is None.
    advantages: [B] (one per response), or one per token; floating point.
    loss_mask: same shape as log_probs, bool or a number type. A token is in the loss if its value is not 0. None
        means every token.
    cu_seqlens: int32 [B + 1], the offsets where the packed responses begin and end. None for [B, L].
    group_ids: [B], integers, for loss_agg_mode="group-token-mean". All responses of a group must be in one call.
    ref_log_probs: same shape as log_probs, log pi_ref. Needed if kl_coef is not 0.
    entropy: same shape as log_probs, H[pi_theta] in nats, differentiable. Needed if entropy_coef is not 0. The
        metrics use it too.
    num_responses, num_tokens, num_groups: counts over the whole mini-batch, for a call that sees a part of it.
        None means the count of this call. If the ranks average their gradients, multiply the loss by the number of
        ranks. A response whose tokens are all masked counts in num_responses; padding rows must not count.
        A number must be above 0. A tensor may be 0 if no token is in the loss; the loss is then exactly 0.
    config: the objective and its options. The default is MiniRL.
    inputs: the PolicyLossInputs of this call, from `PolicyLossInputs.prepare` or `PolicyLossInputs.split`. The
        arguments that it was made of must then be left out.
    check: raise on a GPU for the errors that always raise on the CPU. The host then waits for the GPU. One error is a
        NaN or an infinity inside the mask, in an argument other than log_probs. Another is a loss or c_t that
        overflows float32, for example from an importance weight of exp(95). The last is a tensor count that is not
        above 0. Without check, a GPU gives NaN for the token and counts it in the metrics. With a sequence-level
        objective all tokens of the response are NaN. A NaN in log_probs never raises: it becomes NaN in the results.

    Raises ValueError or TypeError that names the argument, and the token if the error is in one token.
    """
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        raise TypeError(
            f"log_probs is {getattr(log_probs, 'dtype', type(log_probs).__name__)}: it must be a float tensor"
        )
    backend = backend_of(log_probs.device)
    inputs = prepare_inputs(
        log_probs.shape,
        log_probs.device,
        inputs=inputs,
        old_log_probs=old_log_probs,
        rollout_log_probs=rollout_log_probs,
        advantages=advantages,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        group_ids=group_ids,
        ref_log_probs=ref_log_probs,
        num_responses=num_responses,
        num_tokens=num_tokens,
        num_groups=num_groups,
        config=config,
        raises=check or always_looks(log_probs.device, backend),
        backend=backend,
    )
    config = inputs.config
    if entropy is not None:
        check_like("entropy", entropy, log_probs.shape, log_probs.device)
    elif config.entropy_coef:
        raise ValueError(f"entropy is None with entropy_coef={config.entropy_coef}: it must be the entropy of pi_theta")
    values = None if entropy is None else entropy.detach()
    if inputs.raises and entropy is not None:
        values = check_finite("entropy", values, inputs.mask, inputs.layout.offsets)
    return differentiable_loss(log_probs, entropy, inputs, values)


@dataclass(frozen=True, eq=False)
class LossValues:
    """The fields of PolicyLossOutput, with a loss that has no gradient, and d loss / d entropy.

    entropy_grad: None if the loss has no entropy term.
    """

    loss: Tensor
    metrics: PolicyLossMetrics
    log_probs: Tensor
    entropy: Tensor | None
    token_loss: Tensor
    token_grad: Tensor
    entropy_grad: Tensor | None

    def output(self, loss: Tensor) -> PolicyLossOutput:
        """The output with `loss`, which carries the gradient."""
        return PolicyLossOutput(loss, self.metrics, self.log_probs, self.entropy, self.token_loss, self.token_grad)


def differentiable_loss(
    log_probs: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs, entropy_values: Tensor | None
) -> PolicyLossOutput:
    """The output, with a loss that is differentiable by log_probs and entropy. entropy_values: entropy, detached."""
    values = loss_of_log_probs(log_probs.detach(), entropy_values, inputs)
    loss = attach_gradient(values.loss, log_probs, values.token_grad)
    if inputs.config.entropy_coef:
        loss = attach_gradient(loss, entropy, values.entropy_grad)
    return values.output(loss)


def loss_of_log_probs(log_probs: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs) -> LossValues:
    """The values of the loss, from detached log-probabilities. The fused losses call it too."""
    if inputs.backend == "triton":
        return _by_kernels(log_probs, entropy, inputs)
    log_probs = log_probs.float()
    return assemble((log_probs, entropy, *token_losses(log_probs, inputs)), inputs, ResponseSums())


def assemble(
    results: tuple[Tensor, Tensor | None, Tensor, Tensor], inputs: PolicyLossInputs, sums: ResponseSums
) -> LossValues:
    """The values from the results of each token: adds the entropy term, checks, sums, collects the metrics.

    results: log_probs, entropy, and token_loss without the entropy term, and token_grad.
    sums: of `corrected_behaviour`, if the kernels compute.
    """
    if inputs.backend == "triton":
        objective = ObjectiveOptions.of(inputs.config.policy_objective)
        return _sums_by_kernels(TokenResults(*results), inputs, token_values(inputs), sums, objective)
    log_probs, entropy, token_loss, token_grad = results
    metrics = collect_metrics(log_probs, entropy, token_loss.isnan() | token_grad.isnan(), inputs)
    log_probs = log_probs.where(inputs.mask, 0.0)
    if entropy is not None:
        entropy = entropy.float().where(inputs.mask, 0.0)
    if inputs.config.entropy_coef:
        token_loss = token_loss - inputs.config.entropy_coef * inputs.weights * entropy
    # in order and in float64, so that neither the threads nor the layout change the sum
    loss = ordered_sum(inputs.layout.response_sum(token_loss.double())).float()
    return _checked(LossValues(loss, metrics, log_probs, entropy, token_loss, token_grad, inputs.entropy_grad), inputs)


def token_values(inputs: PolicyLossInputs) -> TokenValues:
    """The arguments of the kernels over tokens."""
    per_token = (inputs.old_log_probs, inputs.rollout_log_probs, inputs.ref_log_probs)
    return TokenValues(inputs.mask, inputs.weights, inputs.advantages, *per_token, inputs.layout.cu_seqlens)


def corrected_behaviour(inputs: PolicyLossInputs) -> tuple[Tensor | None, ResponseSums]:
    """(log mu after the correction, None without one; the sums that it took), where old_log_probs is given."""
    options = CorrectionOptions.of(inputs.config)
    if options.correction == "none":
        return None, ResponseSums()
    if inputs.backend != "triton" or not options.changes_d:
        return behaviour_log_probs(inputs.old_log_probs, inputs), ResponseSums()
    values = token_values(inputs)
    sums = response_sums(None, values, "token", options)
    return behaviour_by_kernels(*values, *sums, *options), sums


def _by_kernels(log_probs: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs) -> LossValues:
    """loss_of_log_probs by the kernels over tokens. Torch computes an objective that has no function in them."""
    policy_objective, values = inputs.config.policy_objective, token_values(inputs)
    objective, correction = ObjectiveOptions.of(policy_objective), CorrectionOptions.of(inputs.config)
    sums = response_sums(log_probs, values, objective.level, correction)
    results = TokenResults(log_probs, entropy)
    if not objective.objective:
        ratios = ratios_by_kernels(log_probs, objective.level, *values, *sums, *correction)
        token = TokenRatios(*ratios, inputs.advantages, LossOptions.of(inputs.config).threshold)
        results = TokenResults(log_probs, entropy, *policy_objective.loss(token), *policy_objective.bounds_met(token))
    return _sums_by_kernels(results, inputs, values, sums, objective)


def _sums_by_kernels(
    results: TokenResults,
    inputs: PolicyLossInputs,
    values: TokenValues,
    sums: ResponseSums,
    objective: ObjectiveOptions,
) -> LossValues:
    options = CorrectionOptions.of(inputs.config), LossOptions.of(inputs.config)
    loss, *metrics, log_probs, entropy, token_loss, token_grad, entropy_grad = sums_by_kernels(
        *results, *values, *sums, *objective, *options[0], *options[1]
    )
    entropy = None if results.entropy is None else entropy
    entropy_grad = entropy_grad if inputs.config.entropy_coef else None
    out = LossValues(loss, PolicyLossMetrics(*metrics), log_probs, entropy, token_loss, token_grad, entropy_grad)
    return _checked(out, inputs)


def _checked(values: LossValues, inputs: PolicyLossInputs) -> LossValues:
    if not inputs.raises:
        return values
    checked = check_losses(values.loss, values.token_loss, values.token_grad, values.log_probs, inputs)
    return replace(values, **dict(zip(("loss", "token_loss", "token_grad"), checked, strict=True)))
