"""CISPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import TokenRatios, times
from .clipped import ClippedRatio


@dataclass(frozen=True, kw_only=True)
class CISPO(ClippedRatio):
    """CISPO, Appendix A: sg[min(d, threshold) clip(r)] A log pi. Both bounds act on both signs of the advantage.

    clip_ratio_low, clip_ratio_high: clip(r) is r in [1 - clip_ratio_low, 1 + clip_ratio_high].
    clip: False makes clip(r) = r.
    """

    weighting: ClassVar = "d in loss"
    preset: ClassVar = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "group-token-mean"}

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        return (token.r > self.ratio_high) & self.clip, (token.r < self.ratio_low) & self.clip

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        grad = self.clipped_term(token, above | below)
        return times(token.log_prob, grad), grad
