"""Dual-clip PPO, in the form of verl."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..common.options import check_number
from .base import TokenRatios, times
from .clipped import RatioBounds


@dataclass(frozen=True, kw_only=True)
class DualClip(RatioBounds):
    """Dual-clip PPO (arXiv 1912.09729; `clip_ratio_c` in verl): max(min(r A, clip(r) A), c A) where A < 0.

    Where A >= 0 it is min(r A, clip(r) A).

    clip_ratio_low, clip_ratio_high: clip(r) is r in [1 - clip_ratio_low, 1 + clip_ratio_high].
    clip_ratio_c: c, the upper bound of r where A < 0; above 1.
    log_ratio_max: log r is clamped to [-log_ratio_max, log_ratio_max].
    """

    preset: ClassVar = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "token-mean"}

    clip_ratio_c: float = 3.0
    log_ratio_max: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        check_number("clip_ratio_c", self.clip_ratio_c, "above 1", lambda v: v > 1)
        check_number("log_ratio_max", self.log_ratio_max, "above 0", lambda v: v > 0)

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = super().bounds_met(token)
        above_c = (token.r > min(self.clip_ratio_c, math.exp(self.log_ratio_max))) & (token.advantages < 0)
        return above | above_c, below | ((token.log_r < -self.log_ratio_max) & (token.advantages > 0))

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        r = token.log_r.clamp(-self.log_ratio_max, self.log_ratio_max).exp()
        term = times(-self.two_sided(r, token.advantages, self.clip_ratio_c), token.advantages)
        return term, term.masked_fill(above | below, 0.0)
