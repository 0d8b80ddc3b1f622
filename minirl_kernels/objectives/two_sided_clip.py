"""GRPO with a second upper bound on r, for negative advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..common.options import check_number
from .base import TokenRatios, times
from .clipped import RatioBounds


@dataclass(frozen=True, kw_only=True)
class TwoSidedClip(RatioBounds):
    """Two-sided clipping (INTELLECT-2, arXiv 2505.07291; `delta` in TRL and Liger): min(min(r, delta) A, clip(r) A).

    clip_ratio_low, clip_ratio_high: clip(r) is r in [1 - clip_ratio_low, 1 + clip_ratio_high].
    delta: the upper bound of r where the advantage is negative; above 1 + clip_ratio_high.
    """

    preset: ClassVar = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "token-mean"}

    delta: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        check_number(
            "delta", self.delta, f"above 1 + clip_ratio_high, {self.ratio_high}", lambda v: v > self.ratio_high
        )

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = super().bounds_met(token)
        return above | ((token.r > self.delta) & (token.advantages < 0)), below

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        term = times(-self.two_sided(token.r, token.advantages, self.delta), token.advantages)
        return term, term.masked_fill(above | below, 0.0)
