"""SAPO: a soft gate on r in place of a bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..common.options import check_number
from .base import Objective, TokenRatios, times


@dataclass(frozen=True, kw_only=True)
class SAPO(Objective):
    """Soft adaptive policy optimisation (arXiv 2511.20347): (4 / tau) sigmoid(tau (r - 1)) A.

    tau_pos, tau_neg: tau where A > 0, and where A <= 0. A larger tau makes the gradient fall faster away from r = 1.
    """

    preset: ClassVar = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "seq-mean-token-mean"}

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self):
        for name in ("tau_pos", "tau_neg"):
            check_number(name, getattr(self, name), "above 0", lambda v: v > 0)

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        tau = torch.where(token.advantages > 0, self.tau_pos, self.tau_neg)
        x = tau * (token.r - 1)
        slope = times(4 * x.sigmoid() * (-x).sigmoid(), token.r)
        return -4 / tau * x.sigmoid() * token.advantages, times(-slope, token.advantages)
