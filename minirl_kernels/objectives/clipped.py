"""Bounds on r that several objectives use: 1 - clip_ratio_low and 1 + clip_ratio_high."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.options import check_bool, check_number
from .base import Objective, TokenRatios, times


@dataclass(frozen=True, kw_only=True)
class RatioBounds(Objective):
    """An objective with bounds on r: the upper one acts where A > 0, the lower one where A < 0.

    clip_ratio_low, clip_ratio_high: the bounds are 1 - clip_ratio_low and 1 + clip_ratio_high.
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.27

    def __post_init__(self):
        check_number("clip_ratio_low", self.clip_ratio_low, "in [0, 1]", lambda v: 0 <= v <= 1)
        check_number("clip_ratio_high", self.clip_ratio_high, "at least 0", lambda v: v >= 0)

    @property
    def ratio_low(self) -> float:
        return 1 - self.clip_ratio_low

    @property
    def ratio_high(self) -> float:
        return 1 + self.clip_ratio_high

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = token.r > self.ratio_high, token.r < self.ratio_low
        return above & (token.advantages > 0), below & (token.advantages < 0)

    def two_sided(self, r: Tensor, advantages: Tensor, most: float) -> Tensor:
        """r clamped to [-inf, ratio_high] where the advantage is not negative, else to [ratio_low, most]."""
        return torch.where(advantages < 0, r.clamp(self.ratio_low, most), r.clamp(max=self.ratio_high))


@dataclass(frozen=True, kw_only=True)
class ClippedRatio(RatioBounds):
    """RatioBounds with a switch: clip=False is the "no clipping" ablation."""

    clip: bool = True

    def __post_init__(self):
        check_bool("clip", self.clip)
        super().__post_init__()

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        above, below = super().bounds_met(token)
        return above & self.clip, below & self.clip

    def clipped_term(self, token: TokenRatios, bounded: Tensor) -> Tensor:
        """-min(d, threshold) r A, with r clamped to its bounds where `bounded`."""
        correction = token.log_d.exp()
        # d r as one exponential, because exp(log_r) can overflow where d r does not
        inside = torch.where(correction > token.threshold, token.threshold * token.r, (token.log_d + token.log_r).exp())
        at_bound = times(token.d, token.r.clamp(self.ratio_low, self.ratio_high))
        return times(-torch.where(bounded, at_bound, inside), token.advantages)
