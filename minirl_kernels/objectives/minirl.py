"""MiniRL, the paper's objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import TokenRatios, masked_gradient
from .clipped import ClippedRatio


@dataclass(frozen=True, kw_only=True)
class MiniRL(ClippedRatio):
    """MiniRL, Eq. 7: sg[M min(w, threshold)] A log pi, with M = 0 where a bound on r stops the token."""

    weighting: ClassVar = "w in loss"

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = self.bounds_met(token)
        return masked_gradient(token, above | below)
