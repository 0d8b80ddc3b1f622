"""The sequence-level objective itself, of which the token-level ones are approximations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .reinforce import Reinforce

if TYPE_CHECKING:
    from ..config import PolicyLossConfig


@dataclass(frozen=True, kw_only=True)
class SequenceIS(Reinforce):
    """Sequence-level importance sampling, Eq. 1/2: min(prod_t w_t, threshold) A of each response."""

    level: ClassVar = "sequence"
    preset: ClassVar = {"rollout_is": "sequence", "rollout_is_threshold": None}

    def check_config(self, config: PolicyLossConfig) -> None:
        if config.correction is not None and config.correction.level != "sequence":
            raise ValueError(
                f"rollout_is is {config.rollout_is!r} with objective='sequence_is': its weight is one product over "
                "the response, so rollout_is must be 'sequence' or None"
            )
