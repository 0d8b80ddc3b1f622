"""The correction by d = pi_old / mu_old of the training engine against the inference engine, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from .common.options import check_bool, check_choice, check_number
from .objectives import Level

Beyond = Literal["truncate", "mask_token", "mask_response"]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How d weighs a token: `PolicyLossConfig(rollout_is=Correction(...))`. docs/corrections.md has the known ones.

    level: "token": d_t. "sequence": the product over the response. "sequence_mean": its geometric mean.
    lower, upper: bounds of d at that level; None means none.
    beyond: d outside of the bounds is moved to the bound ("truncate"), takes its token out of the policy term
        ("mask_token"), or takes out the response in which it is ("mask_response"). A masked token still counts in the
        aggregation, and keeps its KL and entropy terms.
    weighs: False: the bounds mask, and a token that they keep has weight 1 (rejection).
    normalise: divide the weights by their mean over the call's tokens (over its responses at the other levels) that
        are not masked. A call must then see the whole mini-batch.

    Raises ValueError or TypeError, naming the field, for a combination that means nothing.
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
            raise ValueError("weighs is False with beyond='truncate': it must be True, since nothing is left of d")
        if not self.weighs and self.normalise:
            raise ValueError("normalise is True with weighs=False: it must be False, since all weights are 1")

    @property
    def masks(self) -> bool:
        return self.beyond != "truncate"

    def check_counts(self, **counts: object) -> None:
        """Raise ValueError, naming the count, where one is given: the call then sees a part of a mini-batch alone."""
        given = [name for name, count in counts.items() if count is not None]
        if given and self.normalise:
            raise ValueError(
                f"{given[0]} is given with rollout_is={self!r}: it must be None, since normalise=True divides by the "
                "mean of the weights that the call sees, so it must see the whole mini-batch"
            )
