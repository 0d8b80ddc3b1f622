"""The objectives that have a function in the kernels. All other objectives take two phases."""

from __future__ import annotations

import math
from typing import Any

from ...objectives import CISPO, GRPO, MiniRL, Objective, Reinforce
from ...objectives.clipped import ClippedRatio

# by exact class, because a derived class may have another loss. The names are also in
# csrc/bindings/fused_policy_loss.cpp and in the Triton kernel.
KERNELS: dict[type[Objective], str] = {MiniRL: "minirl", Reinforce: "reinforce", GRPO: "grpo", CISPO: "cispo"}


def has_kernel(objective: Objective) -> bool:
    return type(objective) in KERNELS


def objective_options(objective: Objective) -> dict[str, Any]:
    """The kernel arguments of an objective: the name of its function, and the bounds of r."""
    name = KERNELS[type(objective)]
    if not isinstance(objective, ClippedRatio):
        return {"objective": name, "clip": False, "ratio_low": 0.0, "ratio_high": math.inf}
    bounds = {"ratio_low": objective.ratio_low, "ratio_high": objective.ratio_high}
    return {"objective": name, "clip": objective.clip, **bounds}
