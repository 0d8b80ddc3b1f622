"""The objectives that have a function in the kernels. All other objectives are computed in torch.

The names are also in csrc/bindings/fused_policy_loss.cpp and in kernels_objective.py. An objective is found by its
exact class, because a derived class may have another loss.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ...objectives import (
    CISPO,
    DPPO,
    GRPO,
    GSPO,
    SAPO,
    DualClip,
    MiniRL,
    Objective,
    Reinforce,
    SequenceIS,
    TwoSidedClip,
)
from ...objectives.clipped import ClippedRatio, RatioBounds

# those of the kernels over rows of logits, in C++ and Triton: their losses take one sweep
KERNELS: dict[type[Objective], str] = {MiniRL: "minirl", Reinforce: "reinforce", GRPO: "grpo", CISPO: "cispo"}
# those of the kernels over tokens, in Triton
TOKEN_KERNELS: dict[type[Objective], str] = {
    **KERNELS,
    SequenceIS: "reinforce",
    GSPO: "grpo",
    SAPO: "sapo",
    DualClip: "two_sided",
    TwoSidedClip: "two_sided",
    DPPO: "dppo",
}


def has_kernel(objective: Objective) -> bool:
    return type(objective) in KERNELS


def has_token_kernel(objective: Objective) -> bool:
    return type(objective) in TOKEN_KERNELS


def objective_options(objective: Objective) -> dict[str, Any]:
    """The arguments of an objective in a kernel over rows: the name of its function, and the bounds of r."""
    name = KERNELS[type(objective)]
    if not isinstance(objective, ClippedRatio):
        return {"objective": name, "clip": False, "ratio_low": 0.0, "ratio_high": math.inf}
    bounds = {"ratio_low": objective.ratio_low, "ratio_high": objective.ratio_high}
    return {"objective": name, "clip": objective.clip, **bounds}


class ObjectiveOptions(NamedTuple):
    """An objective in the kernels over tokens. objective: the name of its function, or "" if its results are given.

    level: Objective.level. clip: whether the bounds act.
    low, high: the bounds of r; of DPPO the bounds of the divergence; of SAPO tau_neg and tau_pos.
    most, log_most: of "two_sided" the bound of r where the advantage is negative, and the bound of abs(log r).
    """

    objective: str = ""
    level: str = "token"
    clip: bool = False
    low: float = 0.0
    high: float = math.inf
    most: float = math.inf
    log_most: float = math.inf

    @classmethod
    def of(cls, objective: Objective) -> ObjectiveOptions:
        name, level = TOKEN_KERNELS.get(type(objective), ""), objective.level
        if not name:
            return cls(level=level)
        if isinstance(objective, SAPO):
            return cls(name, level, low=objective.tau_neg, high=objective.tau_pos)
        if isinstance(objective, DPPO):
            name = f"dppo_{objective.divergence}"
            return cls(name, level, True, objective.divergence_low, objective.divergence_high)
        if not isinstance(objective, RatioBounds):
            return cls(name, level)
        bounds = objective.ratio_low, objective.ratio_high
        if isinstance(objective, DualClip):
            return cls(name, level, True, *bounds, objective.clip_ratio_c, objective.log_ratio_max)
        if isinstance(objective, TwoSidedClip):
            return cls(name, level, True, *bounds, objective.delta)
        return cls(name, level, isinstance(objective, ClippedRatio) and objective.clip, *bounds)
