"""policy_loss: log-probabilities in; loss and metrics out. Torch defines it, and on a GPU kernels compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...common.autograd import attach_gradient
from ...common.checks import always_looks, check_finite, check_like
from ...config import PolicyLossConfig
from .by_kernels import sums_by_kernels
from .inputs import PolicyLossInputs, backend_of, prepare_inputs
from .kernel_arguments import LossOptions, TokenResults, TokenValues, takes_kernel
from .layout import ordered_sum
from .metrics import PolicyLossMetrics, bounds_met, collect_metrics
from .overflow import check_losses
from .reference import token_losses
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
    """The fields of PolicyLossOutput, with a loss that has no gradient."""

    loss: Tensor
    metrics: PolicyLossMetrics
    log_probs: Tensor
    entropy: Tensor | None
    token_loss: Tensor
    token_grad: Tensor

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
        loss = attach_gradient(loss, entropy, inputs.entropy_grad)
    return values.output(loss)


def loss_of_log_probs(log_probs: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs) -> LossValues:
    """The values of the loss, from detached log-probabilities. The fused losses call it too."""
    if inputs.backend == "triton" and takes_kernel(inputs.config):
        return _sums_by_kernels(TokenResults(log_probs, entropy, None, None), inputs)
    log_probs = log_probs.float()
    return assemble(log_probs, entropy, *token_losses(log_probs, inputs), inputs)


def assemble(
    log_probs: Tensor,
    entropy: Tensor | None,
    token_loss: Tensor,
    token_grad: Tensor,
    inputs: PolicyLossInputs,
) -> LossValues:
    """The values from the token losses without entropy term: adds this term, checks, sums, collects the metrics."""
    if inputs.backend == "triton":
        bounds = () if takes_kernel(inputs.config) else bounds_met(log_probs, inputs)
        return _sums_by_kernels(TokenResults(log_probs, entropy, token_loss, token_grad, *bounds), inputs)
    metrics = collect_metrics(log_probs, entropy, token_loss.isnan() | token_grad.isnan(), inputs)
    log_probs = log_probs.where(inputs.mask, 0.0)
    if entropy is not None:
        entropy = entropy.float().where(inputs.mask, 0.0)
    if inputs.config.entropy_coef:
        token_loss = token_loss - inputs.config.entropy_coef * inputs.weights * entropy
    # in order and in float64, so that neither the threads nor the layout change the sum
    loss = ordered_sum(inputs.layout.response_sum(token_loss.double())).float()
    return _checked(loss, metrics, TokenResults(log_probs, entropy, token_loss, token_grad), inputs)


def _sums_by_kernels(results: TokenResults, inputs: PolicyLossInputs) -> LossValues:
    """The same by the kernels over tokens, which compute the token losses too if results has none."""
    per_token = (inputs.old_log_probs, inputs.rollout_log_probs, inputs.ref_log_probs)
    values = TokenValues(inputs.mask, inputs.weights, inputs.advantages, *per_token, inputs.layout.cu_seqlens)
    options = LossOptions.of(inputs.config)
    loss, sums, maxima, log_probs, entropy, token_loss, token_grad = sums_by_kernels(*results, *values, *options)
    results = TokenResults(log_probs, None if results.entropy is None else entropy, token_loss, token_grad)
    return _checked(loss, PolicyLossMetrics(sums, maxima), results, inputs)


def _checked(loss: Tensor, metrics: PolicyLossMetrics, results: TokenResults, inputs: PolicyLossInputs) -> LossValues:
    log_probs, entropy, token_loss, token_grad = results[:4]
    if inputs.raises:
        loss, token_loss, token_grad = check_losses(loss, token_loss, token_grad, log_probs, inputs)
    return LossValues(loss, metrics, log_probs, entropy, token_loss, token_grad)
