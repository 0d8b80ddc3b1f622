"""The sequence-level objective, which the token-level objectives approximate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .reinforce import Reinforce


@dataclass(frozen=True, kw_only=True)
class SequenceIS(Reinforce):
    """Sequence-level importance sampling, Eq. 1/2: min(prod_t w_t, threshold) A for each response."""

    level: ClassVar = "sequence"
    preset: ClassVar = {"rollout_is": "sequence", "rollout_is_threshold": None}

    def check_rollout_is(self, rollout_is: object) -> None:
        if getattr(rollout_is, "level", rollout_is) not in ("sequence", None):
            raise ValueError(
                f"rollout_is is {rollout_is!r} with objective='sequence_is': the weight of this objective is one "
                "product over the response, so rollout_is must be 'sequence' or None"
            )
