"""The loss of each token and its derivative by the log-probability, in eager torch.

This file and `minirl_kernels/objectives` are the reference for the kernels. The kernels have `token_objective` in
`csrc/common/objective.h` (C++) and in `ops/policy_loss/kernels_objective.py` (Triton). Tests compare the three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import PolicyLossConfig
from ...objectives import TokenRatios, times
from .correction import log_correction
from .inputs import PolicyLossInputs


def token_losses(log_probs: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log_probs) per token, weighted: the losses sum to the policy and KL terms of the loss.

    log_probs: float32, of the shape of the other per-token tensors. Values outside the mask count as 0.
    The results are float32, computed in float64, so that the sum of the log-ratios of a long response is accurate.
    If one of the two overflows float32, both are NaN for this token. The row's gradient then has no mix of infinities.
    """
    config, mask = inputs.config, inputs.mask
    token = token_ratios(log_probs, inputs)
    loss, grad = _policy_term(token, config)
    if config.policy_objective.level == "sequence":
        loss = loss / inputs.lengths  # every token has the loss of its response, and gets an equal share
    if config.kl_coef:
        kl, kl_grad = kl_penalty(token.log_prob, inputs.ref_log_probs, config.kl_estimator)
        loss, grad = loss + config.kl_coef * kl, grad + config.kl_coef * kl_grad
    loss, grad = (torch.where(mask, inputs.weights * values, 0.0).float() for values in (loss, grad))
    finite = loss.isfinite() & grad.isfinite()
    return torch.where(finite, loss, torch.nan), torch.where(finite, grad, torch.nan)


def token_ratios(log_probs: Tensor, inputs: PolicyLossInputs) -> TokenRatios:
    """The log-ratios of each token at the objective's level; 0 where masked."""
    config, mask, layout = inputs.config, inputs.mask, inputs.layout
    log_probs = torch.where(mask, log_probs, 0.0).double()
    old_log_probs = log_probs if inputs.old_log_probs is None else torch.where(mask, inputs.old_log_probs, 0.0).double()
    behaviour = torch.where(mask, behaviour_log_probs(old_log_probs, inputs), 0.0)
    log_r, log_w, log_d = log_probs - old_log_probs, log_probs - behaviour, old_log_probs - behaviour
    if config.is_sequence_level:
        log_r = layout.to_tokens(layout.response_sum(log_r))
        if config.policy_objective.level == "sequence_mean":
            log_r = log_r / inputs.lengths
        log_w = log_r + log_d
    threshold = float("inf") if config.rollout_is_threshold is None else config.rollout_is_threshold
    return TokenRatios(log_probs, log_r, log_w, log_d, inputs.advantages, threshold)


def behaviour_log_probs(old_log_probs: Tensor, inputs: PolicyLossInputs) -> Tensor:
    """log mu after the correction of config.rollout_is: old_log_probs - result = log of the corrected d."""
    correction = inputs.config.correction
    if correction is None:
        return old_log_probs
    if inputs.config.rollout_is == "token":
        return inputs.rollout_log_probs  # exact: old - (old - rollout) would round
    log_d = torch.where(inputs.mask, old_log_probs.double() - inputs.rollout_log_probs, 0.0)
    return old_log_probs - log_correction(log_d, correction, inputs)


def token_objective(
    log_probs: Tensor,
    log_r: Tensor,
    log_w: Tensor,
    log_d: Tensor,
    advantages: Tensor,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log_prob) of every token before aggregation. The tensors are the fields of TokenRatios."""
    threshold = float("inf") if config.rollout_is_threshold is None else config.rollout_is_threshold
    return _policy_term(TokenRatios(log_probs, log_r, log_w, log_d, advantages, threshold), config)


def _policy_term(token: TokenRatios, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    loss, grad = config.policy_objective.loss(token)
    if config.policy_objective.weighting == "d":
        return times(token.d, loss), times(token.d, grad)
    return loss, grad


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(KL(pi_theta || pi_ref), its derivative by log_probs) per token, by Schulman's estimator k1, k2 or k3."""
    log_ratio = ref_log_probs - log_probs
    if estimator == "k1":
        return -log_ratio, torch.ones_like(log_ratio)
    if estimator == "k2":
        return 0.5 * log_ratio.square(), -log_ratio
    return log_ratio.expm1() - log_ratio, -log_ratio.expm1()
