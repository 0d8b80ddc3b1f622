"""DPPO: the divergence of the two policies masks tokens, in place of a bound on their ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..common.options import check_choice, check_number
from .base import Objective, TokenRatios, masked_gradient, times


@dataclass(frozen=True, kw_only=True)
class DPPO(Objective):
    """Divergence PPO (arXiv 2602.04879), binary form: sg[M min(w, threshold)] A log pi.

    p = pi_theta and q = mu_old of the sampled token. M = 0 where A (p - q) > 0 and the divergence is above its bound.

    divergence: "tv": |p - q|. "kl": q log(q / p) + (1 - q) log((1 - q) / (1 - p)).
    divergence_low, divergence_high: the bound where the advantage is negative, and where it is positive.
    """

    weighting: ClassVar = "w in loss"
    preset: ClassVar = {"rollout_is": "token", "rollout_is_threshold": 20.0, "loss_agg_mode": "token-mean"}

    divergence: Literal["tv", "kl"] = "tv"
    divergence_low: float = 0.2
    divergence_high: float = 0.2

    def __post_init__(self):
        check_choice("divergence", self.divergence, ("tv", "kl"))
        for name in ("divergence_low", "divergence_high"):
            check_number(name, getattr(self, name), "at least 0", lambda v: v >= 0)

    def check_rollout_is(self, rollout_is: object) -> None:
        if rollout_is not in ("token", None):
            raise ValueError(f"rollout_is is {rollout_is!r} with DPPO: it must be 'token' or None")

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        p, q = token.log_prob.exp(), (token.log_prob - token.log_w).exp()
        gap = (p - q).abs()
        if self.divergence == "kl":
            gap = times(q, -token.log_w) + times(1 - q, torch.log1p(-q) - torch.log1p(-p))
        above = (token.advantages > 0) & (p > q) & (gap > self.divergence_high)
        return above, (token.advantages < 0) & (p < q) & (gap > self.divergence_low)

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        return masked_gradient(token, above | below)
