"""The same bits in whatever order the programs of a launch run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cases import AnyCase
from .interpreter import recorded, recording


def check(case: AnyCase) -> list[str]:
    (launch,), expected = recorded(case)
    programs = np.arange(np.prod(launch.grid))
    orders = {
        "reversed": programs[::-1],
        "shuffled": np.random.default_rng(0).permutation(programs),
    }
    faults = []
    for name, order in orders.items():
        with recording(order.tolist()):
            outputs = case.run(traps=True)
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(expected, outputs, strict=True)):
            faults.append(f"{case}: {launch.kernel}: other bits when its programs run {name}")
    return faults


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)
