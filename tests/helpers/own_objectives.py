"""Objectives as a user would write them, and the published equations of the library's example objectives."""

from __future__ import annotations

from dataclasses import dataclass

import equations
import torch

from minirl_kernels.objectives import DPPO, GRPO, SAPO, DualClip, Objective, TwoSidedClip, times


@dataclass(frozen=True, kw_only=True)
class Squared(Objective):
    """Loss -scale A r^2, without bounds. The library applies the correction by d."""

    scale: float = 0.5

    def loss(self, token):
        term = times(-self.scale * (2 * token.log_r).exp(), token.advantages)
        return term, 2 * term


class SquaredOfResponse(Squared):
    level = "sequence"


class SquaredOfMean(Squared):
    level = "sequence_mean"


class Ascent(GRPO):
    """The loss of GRPO with its sign reversed. No kernel implements it."""

    def loss(self, token):
        return tuple(-values for values in super().loss(token))


def example_objective(name, objective, log_probs, old, mu, advantages):
    """J of each token [n] by the published equation, differentiable.

    mu is old where the config has no correction.
    """
    r = (log_probs - old).exp()
    d = (old - mu).exp().detach()
    if name == "sapo":
        tau = torch.where(advantages > 0, objective.tau_pos, objective.tau_neg)
        return d * torch.sigmoid(tau * (r - 1)) * 4 / tau * advantages
    if name == "dual_clip":
        r = (log_probs - old).clamp(-objective.log_ratio_max, objective.log_ratio_max).exp()
        clipped = r.clamp(1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high)
        losses = torch.maximum(-advantages * r, -advantages * clipped)
        lower = torch.minimum(-advantages * objective.clip_ratio_c, losses)
        return -d * torch.where(advantages < 0, lower, losses)
    if name == "two_sided":
        clipped = r.clamp(1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high)
        return d * torch.minimum(r.clamp(max=objective.delta) * advantages, clipped * advantages)
    p, q = log_probs.exp().detach(), mu.exp()
    if objective.divergence == "tv":
        kept = torch.where(advantages > 0, p - q <= objective.divergence_high, p - q >= -objective.divergence_low)
    else:
        gap = q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())
        kept = torch.where(
            advantages > 0,
            (gap <= objective.divergence_high) | (p <= q),
            (gap <= objective.divergence_low) | (p >= q),
        )
    return (p / q).clamp(max=20.0) * kept * advantages * log_probs


EXAMPLES = {
    "sapo": SAPO(tau_pos=1.0, tau_neg=1.3),
    "dual_clip": DualClip(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=2.5, log_ratio_max=1.4),
    "two_sided": TwoSidedClip(delta=2.0),
    "dppo_tv": DPPO(divergence_low=0.15, divergence_high=0.1),
    "dppo_kl": DPPO(divergence="kl", divergence_low=0.05, divergence_high=0.03),
}


def example_loss(name, config, log_probs, batch):
    """The loss of the whole batch by `example_objective`, from log-probabilities [T]."""
    sums, counts = [], []
    for start, end in batch.spans():
        tokens = [t for t in range(start, end) if batch.loss_mask[t]]
        old, mu, advantages = (
            values.to(log_probs.dtype)[tokens]
            for values in (batch.old_log_probs, batch.rollout_log_probs, batch.token_advantages())
        )
        mu = old if config.rollout_is is None else mu
        sums.append(-example_objective(name, config.objective, log_probs[tokens], old, mu, advantages).sum())
        counts.append(len(tokens))
    return equations.aggregate(sums, counts, batch.group_ids, config)
