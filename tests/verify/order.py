"""A launch gives the same bits in every order of its programs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from verify.case import Case
from verify.interpreter import recorded, recording


def check(case: Case) -> list[str]:
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
    """As integers, because NaN does not equal itself."""
    return tensor.contiguous().view(torch.uint8)
