"""The objectives, once: from log-probabilities to each token's loss and its derivative, in eager torch.

This file defines what is correct. `token_objective` in C++ is `csrc/common/objective.h`, in Triton it stands in
`ops/fused_policy_loss/triton.py`; a property test binds the three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import PolicyLossConfig
from .inputs import PolicyLossInputs


def token_losses(log_probs: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log_probs) per token, aggregated: the losses sum to the policy and KL terms of the loss.

    log_probs: float32, of the shape of every other per-token argument. 0 outside the mask, whatever stands there.
    Computed in float64, so that a long response's sum of log-ratios keeps its digits; returned as float32. Both are
    NaN for a token where float32 holds one of them not, so that it has no gradient of two infinities.
    """
    config, mask = inputs.config, inputs.mask
    log_probs = torch.where(mask, log_probs, 0.0).double()
    loss, grad = token_objective(log_probs, *log_ratios(log_probs, inputs), inputs.advantages, config)
    if config.objective == "sequence_is":
        loss = loss / inputs.lengths  # Eq. 1 has one value per response: each token shows its share
    if config.kl_coef:
        kl, kl_grad = kl_penalty(log_probs, inputs.ref_log_probs, config.kl_estimator)
        loss, grad = loss + config.kl_coef * kl, grad + config.kl_coef * kl_grad
    loss, grad = (torch.where(mask, inputs.weights * values, 0.0).float() for values in (loss, grad))
    finite = loss.isfinite() & grad.isfinite()
    return torch.where(finite, loss, torch.nan), torch.where(finite, grad, torch.nan)


def log_ratios(log_probs: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(log r, log w, log d) as the objective sees them: per token, or its response's at every token; 0 if masked.

    float64.
    """
    config, mask, layout = inputs.config, inputs.mask, inputs.layout
    log_probs = torch.where(mask, log_probs, 0.0).double()
    old_log_probs = log_probs if inputs.old_log_probs is None else torch.where(mask, inputs.old_log_probs, 0.0).double()
    behaviour = torch.where(mask, behaviour_log_probs(old_log_probs, inputs), 0.0)
    log_r, log_w, log_d = log_probs - old_log_probs, log_probs - behaviour, old_log_probs - behaviour
    if config.is_sequence_level:
        log_r = layout.to_tokens(layout.response_sum(log_r))
        log_w = log_r + log_d
    if config.objective == "gspo":
        log_r = log_r / inputs.lengths
    return log_r, log_w, log_d


def behaviour_log_probs(old_log_probs: Tensor, inputs: PolicyLossInputs) -> Tensor:
    """log mu as the objective is to see it: old - behaviour is log d at the level of `rollout_is`."""
    if inputs.config.rollout_is is None:
        return old_log_probs
    if inputs.config.rollout_is == "token":
        return inputs.rollout_log_probs
    log_d = torch.where(inputs.mask, old_log_probs.double() - inputs.rollout_log_probs, 0.0)
    return old_log_probs - inputs.layout.to_tokens(inputs.layout.response_sum(log_d))


def token_objective(
    log_probs: Tensor,
    log_r: Tensor,
    log_w: Tensor,
    log_d: Tensor,
    advantages: Tensor,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log_probs) of every token before aggregation: minus the objective of `config.objective`.

    log_r, log_w, log_d: log of pi_theta/pi_old, pi_theta/mu_old and pi_old/mu_old. All arguments share one shape.
    A zero advantage and a masked ratio give exactly 0, whatever overflows beside them; NaN stays NaN.
    """
    r, low, high = log_r.exp(), 1 - config.clip_ratio_low, 1 + config.clip_ratio_high
    above, below = (r > high) & config.clip, (r < low) & config.clip
    stopped = ((advantages > 0) & above) | ((advantages < 0) & below)
    threshold = float("inf") if config.rollout_is_threshold is None else config.rollout_is_threshold
    if config.weighs_by_w:
        grad = _times(-log_w.exp().clamp(max=threshold), advantages.masked_fill(stopped, 0.0))
        return (_times(log_probs, grad) if config.objective == "minirl" else grad), grad
    bounded = (above | below) if config.objective == "cispo" else stopped
    correction = log_d.exp()
    # d r as one exponential, so that a large ratio meets a small correction
    inside = torch.where(correction > threshold, threshold * r, (log_d + log_r).exp())
    at_bound = _times(correction.clamp(max=threshold), r.clamp(low, high))
    term = _times(-torch.where(bounded, at_bound, inside), advantages)
    if config.objective == "cispo":
        return _times(log_probs, term), term
    return term, term.masked_fill(bounded, 0.0)


def kl_penalty(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """(estimate, its derivative by log_probs) of KL(pi_theta || pi_ref) per token (Schulman's k1, k2, k3)."""
    log_ratio = ref_log_probs - log_probs
    if estimator == "k1":
        return -log_ratio, torch.ones_like(log_ratio)
    if estimator == "k2":
        return 0.5 * log_ratio.square(), -log_ratio
    return log_ratio.expm1() - log_ratio, -log_ratio.expm1()


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor, with 0 where one of them is 0 even if the other overflowed; NaN goes through."""
    nothing = ((factor == 0) & ~weight.isnan()) | ((weight == 0) & ~factor.isnan())
    return torch.where(nothing, 0.0, weight * factor)
