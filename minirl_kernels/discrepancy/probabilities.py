"""Distances between two policies: on the sampled tokens, and over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import PolicyLossConfig
from ..ops.policy_loss import policy_loss

QUANTILES = (0.5, 0.9, 0.99, 0.999)
_ROWS_AT_ONCE = 64  # float64 logits of 64 rows take 78 MB for a vocabulary of 152,000


def full_vocabulary_kl(mu_logits: Tensor, pi_logits: Tensor) -> Tensor:
    """KL(mu || pi) = sum_v mu(v) (log mu(v) - log pi(v)) for each token, [T] float64, nats.

    mu_logits, pi_logits: [T, V], any float dtype; computed in float64. A logit of -inf in mu adds 0.
    Raises ValueError if the shapes differ.
    """
    if mu_logits.shape != pi_logits.shape or mu_logits.dim() != 2:
        raise ValueError(
            f"mu_logits has shape {tuple(mu_logits.shape)} and pi_logits {tuple(pi_logits.shape)}: they must be the "
            "same [T, V]"
        )
    out = torch.empty(len(mu_logits), dtype=torch.float64)
    for start in range(0, len(out), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_mu, log_pi = (logits[rows].double().log_softmax(-1) for logits in (mu_logits, pi_logits))
        mu = log_mu.exp()
        out[rows] = torch.where(mu > 0, mu * (log_mu - log_pi), 0.0).sum(-1)
    return out


def sampled_token_metrics(
    rollout_log_probs: Sequence[Tensor],
    old_log_probs: Sequence[Tensor],
    log_probs: Sequence[Tensor] | None = None,
    config: PolicyLossConfig = PolicyLossConfig(),
) -> dict[str, float]:
    """The metrics of `PolicyLossMetrics.compute` for some responses, with the quantiles of |log d|.

    rollout_log_probs, old_log_probs, log_probs: log mu_old, log pi_old and log pi_theta of each response, [R] in nats;
        log_probs=None means pi_old.
    config: bounds of the ratio r, and the truncation threshold of the weight w.
    clip_fraction_high is the fraction of tokens that would be masked if all advantages were positive.
    clip_fraction_low is the fraction that would be masked if all advantages were negative.
    Additional entries: `log_d_abs_quantiles`, and `bit_equal_fraction`, the fraction of tokens whose log mu_old and
    log pi_old have the same bits.
    """
    lengths = torch.tensor([0, *(len(values) for values in rollout_log_probs)])
    mu, old = torch.cat(list(rollout_log_probs)), torch.cat(list(old_log_probs))
    current = old if log_probs is None else torch.cat(list(log_probs))

    def metrics(advantage: float) -> dict[str, float]:
        return policy_loss(
            current,
            old_log_probs=old,
            rollout_log_probs=mu,
            advantages=torch.full((len(lengths) - 1,), advantage),
            loss_mask=None,
            cu_seqlens=lengths.cumsum(0).int(),
            config=config,
        ).metrics.compute()

    out = metrics(1.0)
    out["clip_fraction_low"] = metrics(-1.0)["clip_fraction_low"]
    log_d = (old.double() - mu.double()).abs().numpy()
    out["log_d_abs_quantiles"] = dict(zip(map(str, QUANTILES), np.quantile(log_d, QUANTILES).tolist(), strict=True))
    out["bit_equal_fraction"] = (old == mu).double().mean().item()
    return out
