"""REINFORCE with importance sampling per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Objective, TokenRatios, times


@dataclass(frozen=True, kw_only=True)
class Reinforce(Objective):
    """REINFORCE, Eq. 3/4: min(w, threshold) A."""

    weighting: ClassVar = "w in loss"
    preset: ClassVar = {"rollout_is_threshold": None}

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        grad = times(-token.w, token.advantages)
        return grad, grad
