"""No access outside the tensors that a launch was given, nor into the gaps between the rows of a strided one."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from verify.case import Case
from verify.interpreter import Launch, recorded


def outside(launch: Launch) -> list[str]:
    """One line for each kind of access with addresses that are no element of a tensor argument."""
    faults = []
    for kind in ("load", "store", "atomic"):
        addresses, programs, _ = launch.addresses(kind)
        inside = np.zeros(len(addresses), bool)
        for tensor in launch.tensors.values():
            inside |= _is_element(tensor, addresses)
        if not inside.all():
            culprits = np.unique(programs[~inside])
            faults.append(
                f"{launch.kernel}: {int((~inside).sum())} {kind}s are outside every tensor, the first by program "
                f"{culprits[0]}"
            )
    return faults


def check(case: Case) -> list[str]:
    launches, _ = recorded(case)
    return [f"{case}: {fault}" for launch in launches for fault in outside(launch)]


def _is_element(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
    """Take the index along each axis from the offset, the widest stride first; an element leaves no rest."""
    rest = addresses.astype(np.int64) - tensor.data_ptr()
    inside = rest >= 0
    size_of = tensor.element_size()
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: -axis[1]):
        if size > 1 and stride > 0:
            index = np.minimum(rest // (stride * size_of), size - 1)
            rest = rest - index * stride * size_of
    return inside & (rest == 0)
