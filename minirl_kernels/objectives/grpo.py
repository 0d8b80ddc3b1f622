"""GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import TokenRatios
from .clipped import ClippedRatio


@dataclass(frozen=True, kw_only=True)
class GRPO(ClippedRatio):
    """GRPO, Appendix A: sg[min(d, threshold)] min(r A, clip(r) A).

    clip_ratio_low, clip_ratio_high: clip(r) is r in [1 - clip_ratio_low, 1 + clip_ratio_high].
    clip: False makes clip(r) = r.
    """

    weighting: ClassVar = "d in loss"
    preset: ClassVar = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "seq-mean-token-mean"}

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        term = self.clipped_term(token, above | below)
        return term, term.masked_fill(above | below, 0.0)
