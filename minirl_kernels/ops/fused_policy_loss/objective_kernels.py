"""The objectives that have a function of their own in the kernels; every other one takes two phases."""

from __future__ import annotations

import math
from typing import Any

from ...objectives import CISPO, GRPO, MiniRL, Objective, Reinforce
from ...objectives.clipped import ClippedRatio

# by class, so that a derived class with a loss of its own does not run as its base. The names are in
# csrc/bindings/fused_policy_loss.cpp and in the Triton kernel.
KERNELS: dict[type[Objective], str] = {MiniRL: "minirl", Reinforce: "reinforce", GRPO: "grpo", CISPO: "cispo"}


def has_kernel(objective: Objective) -> bool:
    return type(objective) in KERNELS


def objective_options(objective: Objective) -> dict[str, Any]:
    """The name of the objective's function, and the bounds of r, as the kernels take them."""
    name = KERNELS[type(objective)]
    if not isinstance(objective, ClippedRatio):
        return {"objective": name, "clip": False, "ratio_low": 0.0, "ratio_high": math.inf}
    bounds = {"ratio_low": objective.ratio_low, "ratio_high": objective.ratio_high}
    return {"objective": name, "clip": objective.clip, **bounds}
