"""policy_loss: log-probabilities in, loss and every metric out. It is O(tokens), so it is plain torch."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...common.autograd import attach_gradient
from ...common.checks import check_finite, check_like
from ...config import PolicyLossConfig
from .inputs import PolicyLossInputs, prepare_inputs
from .layout import ordered_sum
from .metrics import PolicyLossMetrics, collect_metrics
from .overflow import check_losses
from .reference import token_losses
from .two_forms import takes_inputs


class PolicyLossOutput(NamedTuple):
    """What every policy loss returns; only `loss` carries gradient. Per-token tensors are float32, 0 where masked."""

    loss: Tensor  # scalar float32
    metrics: PolicyLossMetrics
    log_probs: Tensor  # log pi_theta of the tokens, nats
    entropy: Tensor | None  # H[pi_theta] at the tokens, nats; None if policy_loss was given none
    token_loss: Tensor  # each token's share of the loss; they sum to it
    token_grad: Tensor  # c_t = d loss / d log_probs


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

    log_probs: [B, L] (padded, rows are responses) or [T] (packed), log pi_theta of each token in nats; its gradient
        is c_t, whatever autograd made it with. Values outside the mask may be anything.
    old_log_probs: log pi_old by the training engine, same shape; None means the detached log_probs (on policy).
    rollout_log_probs: log mu_old as the inference engine sampled; may be None if config.rollout_is is None.
    advantages: [B], one per response, or one per token.
    loss_mask: 1 where a token is in the loss (any bool or number); None means every token.
    cu_seqlens: int32 [B + 1], where the packed responses begin and end; None for [B, L].
    group_ids: integers [B], for loss_agg_mode="group-token-mean"; a group must not be split over calls.
    ref_log_probs: log pi_ref, for kl_coef. entropy: H[pi_theta], differentiable, for entropy_coef and the metrics.
    num_responses, num_tokens, num_groups: counts of the whole mini-batch over micro-batches and ranks, where this
        call sees a part of it (multiply the loss by the number of ranks if gradients are averaged over them).
        A response whose tokens are all masked counts; leave padding rows out of num_responses. A number must be
        above 0; a tensor may be 0 where no token is in the loss, which is then exactly 0.
    inputs: a PolicyLossInputs, of `PolicyLossInputs.prepare` or a part of one; the arguments that it was made of
        are then left out.
    check: raise on a GPU too, which waits for it, for what raises on the CPU: inside the mask a NaN or an infinity in
        an argument; a token whose loss or c_t float32 does not hold (an importance weight of exp(95), say), unless
        it is clipped, truncated or has advantage 0; a count that is not above 0. Without it a GPU gives NaN for that
        token, or for its response where the objective is of responses, and counts it in the metrics. A NaN in
        log_probs is the model's and raises nowhere: it is NaN in the results.
    Raises ValueError or TypeError that names the argument, and the token where it is one token's.
    """
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        raise TypeError(
            f"log_probs is {getattr(log_probs, 'dtype', type(log_probs).__name__)}: it must be a float tensor"
        )
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
        raises=check or log_probs.device.type == "cpu",
    )
    config = inputs.config
    if entropy is not None:
        check_like("entropy", entropy, log_probs.shape, log_probs.device)
    elif config.entropy_coef:
        raise ValueError(f"entropy is None with entropy_coef={config.entropy_coef}: it must be that of pi_theta")
    values = None if entropy is None else entropy.detach()
    if inputs.raises and entropy is not None:
        values = check_finite("entropy", values, inputs.mask, inputs.layout.offsets)
    return differentiable_loss(log_probs, entropy, inputs, values)


def differentiable_loss(
    log_probs: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs, entropy_values: Tensor | None
) -> PolicyLossOutput:
    """The whole output, its loss carrying gradient to log_probs and entropy; entropy_values: entropy, detached."""
    output = loss_of_log_probs(log_probs.detach().float(), entropy_values, inputs)
    loss = attach_gradient(output.loss, log_probs, output.token_grad)
    if inputs.config.entropy_coef:
        loss = attach_gradient(loss, entropy, inputs.entropy_grad)
    return output._replace(loss=loss)


def loss_of_log_probs(log_probs: Tensor, entropy: Tensor | None, inputs: PolicyLossInputs) -> PolicyLossOutput:
    """The whole output from detached float32 log-probabilities, without gradient; the fused forms call it too."""
    token_loss, token_grad = token_losses(log_probs, inputs)
    return assemble_output(log_probs, entropy, token_loss, token_grad, inputs)


def assemble_output(
    log_probs: Tensor,
    entropy: Tensor | None,
    token_loss: Tensor,
    token_grad: Tensor,
    inputs: PolicyLossInputs,
) -> PolicyLossOutput:
    """Sum the tokens' losses (without their entropy bonus, added here), check them, and collect the metrics."""
    metrics = collect_metrics(log_probs, entropy, token_loss.isnan() | token_grad.isnan(), inputs)
    log_probs = log_probs.where(inputs.mask, 0.0)
    if entropy is not None:
        entropy = entropy.float().where(inputs.mask, 0.0)
    if inputs.config.entropy_coef:
        token_loss = token_loss - inputs.config.entropy_coef * inputs.weights * entropy
    # in order and in float64, so that neither threads nor layout change the sum
    loss = ordered_sum(inputs.layout.response_sum(token_loss.double())).float()
    if inputs.raises:
        loss, token_loss, token_grad = check_losses(loss, token_loss, token_grad, log_probs, inputs)
    return PolicyLossOutput(loss, metrics, log_probs, entropy, token_loss, token_grad)
