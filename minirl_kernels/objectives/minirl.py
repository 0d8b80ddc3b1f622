"""MiniRL, the paper's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import TokenRatios, masked_gradient
from .clipped import ClippedRatio


@dataclass(frozen=True, kw_only=True)
class MiniRL(ClippedRatio):
    """MiniRL, Eq. 7: sg[M min(w, threshold)] A log pi.

    M = 0 where r is above its upper bound and A > 0, or below its lower bound and A < 0. Otherwise M = 1.

    clip_ratio_low, clip_ratio_high: the bounds on r are 1 - clip_ratio_low and 1 + clip_ratio_high.
    clip: False makes M = 1 everywhere.
    """

    weighting: ClassVar = "w in loss"

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        return masked_gradient(token, above | below)
