"""The train-inference correction by d = pi_old / mu_old, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .common.options import check_bool, check_choice, check_number
from .objectives import Level

Beyond = Literal["truncate", "mask_token", "mask_response"]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The weight of a token as a function of d, given as `PolicyLossConfig(rollout_is=Correction(...))`.

    docs/corrections.md lists the corrections of TRL, verl and other frameworks in this form.

    level: "token": d_t of each token. "sequence": the product of d over the response. "sequence_mean": the geometric
        mean of d over the response.
    lower, upper: bounds of d at this level. None means no bound.
    beyond: what happens if d is outside of the bounds. "truncate": d becomes the bound. "mask_token": the policy term
        of the token is 0. "mask_response": the policy terms of all tokens of the response are 0. A masked token still
        counts in the aggregation, and keeps its KL and entropy terms.
    weighs: whether an unmasked token has the weight d. False: its weight is 1, and d only masks (rejection).
    normalise: divide the weights by their mean over the unmasked tokens of the call, or over its unmasked responses
        if level is not "token". A call must then see the whole mini-batch.

    Raises ValueError or TypeError that names the field, for a wrong value or for fields that contradict each other.
    """

    level: Level = "token"
    lower: float | None = None
    upper: float | None = None
    beyond: Beyond = "truncate"
    weighs: bool = True
    normalise: bool = False

    def __post_init__(self):
        check_choice("level", self.level, get_args(Level))
        check_choice("beyond", self.beyond, get_args(Beyond))
        check_bool("weighs", self.weighs)
        check_bool("normalise", self.normalise)
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "above 0 and finite, or None", lambda v: 0 < v < float("inf"))
        if self.lower is not None and self.upper is not None and self.lower > self.upper:
            raise ValueError(f"lower is {self.lower} with upper={self.upper}: it must be at most upper")
        if self.masks and self.lower is None and self.upper is None:
            raise ValueError(
                f"beyond is {self.beyond!r} without lower and upper: it must be 'truncate', or have a bound"
            )
        if self.beyond == "mask_token" and self.level != "token":
            raise ValueError(
                f"beyond is 'mask_token' with level={self.level!r}: it must be 'mask_response', since all tokens of a "
                "response have its d"
            )
        if not self.weighs and not self.masks:
            raise ValueError("weighs is False with beyond='truncate': it must be True, since d would have no effect")
        if not self.weighs and self.normalise:
            raise ValueError("normalise is True with weighs=False: it must be False, since all weights are 1")

    @property
    def masks(self) -> bool:
        """Whether d outside of the bounds masks tokens."""
        return self.beyond != "truncate"

    def check_counts(self, **counts: object) -> None:
        """Raise ValueError that names a given count: with a count, the call sees only a part of the mini-batch."""
        given = [name for name, count in counts.items() if count is not None]
        if given and self.normalise:
            raise ValueError(
                f"{given[0]} is given with rollout_is={self!r}: it must be None, since normalise=True divides by the "
                "mean of the weights that the call sees, so it must see the whole mini-batch"
            )
