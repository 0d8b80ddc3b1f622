"""The objectives that have a function of their own in the kernels; every other one takes two phases."""

from __future__ import annotations

import math

from ...objectives import CISPO, GRPO, MiniRL, Objective, Reinforce

# by class, so that a derived class with a loss of its own does not run as its base. The names are in
# csrc/bindings_losses.cpp and in the Triton kernel.
KERNELS: dict[type[Objective], str] = {MiniRL: "minirl", Reinforce: "reinforce", GRPO: "grpo", CISPO: "cispo"}


def has_kernel(objective: Objective) -> bool:
    return type(objective) in KERNELS


def objective_arguments(objective: Objective) -> tuple[str, bool, float, float]:
    """(name, clip, lower and upper bound of r), as the kernels take them."""
    name = KERNELS[type(objective)]
    if isinstance(objective, Reinforce):
        return name, False, 0.0, math.inf
    return name, objective.clip, objective.ratio_low, objective.ratio_high
