"""Each output element is written by exactly one program, and no other program reads it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from verify.case import Case
from verify.interpreter import Launch, recorded


def conflicts(launch: Launch) -> list[str]:
    """Addresses that two programs write, or one writes and another reads; and atomics, whose order is undefined."""
    faults = [f"{launch.kernel}: uses an atomic" for access in launch.accesses if access.kind == "atomic"][:1]
    stored, writers, _ = launch.addresses("store", "atomic")
    owned = np.unique(np.stack([stored, writers.astype(np.uint64)], axis=1), axis=0)
    addresses, counts = np.unique(owned[:, 0], return_counts=True)
    if (counts > 1).any():
        faults.append(f"{launch.kernel}: {int((counts > 1).sum())} addresses are written by more than one program")
    loaded, readers, _ = launch.addresses("load")
    place = np.searchsorted(addresses, loaded)
    is_stored = place < len(addresses)
    is_stored[is_stored] = addresses[place[is_stored]] == loaded[is_stored]
    first_writer = owned[np.searchsorted(owned[:, 0], addresses), 1]
    foreign = first_writer[place[is_stored]] != readers[is_stored].astype(np.uint64)
    if foreign.any():
        faults.append(f"{launch.kernel}: {int(foreign.sum())} loads read what another program of the launch writes")
    return faults


def unwritten(launches: list[Launch], outputs: tuple[Tensor, ...]) -> list[str]:
    """Outputs with elements that no launch has written."""
    stored = np.concatenate([launch.addresses("store", "atomic")[0] for launch in launches])
    faults = []
    for number, output in enumerate(outputs):
        missing = ~np.isin(element_addresses(output), stored)
        if missing.any():
            faults.append(f"output {number}, {tuple(output.shape)}: {int(missing.sum())} elements are never written")
    return faults


def element_addresses(tensor: Tensor) -> np.ndarray:
    """The address of every element."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return (tensor.data_ptr() + offsets.ravel() * tensor.element_size()).astype(np.uint64)


def check(case: Case) -> list[str]:
    launches, outputs = recorded(case)
    faults = [fault for launch in launches for fault in conflicts(launch)] + unwritten(launches, outputs)
    return [f"{case}: {fault}" for fault in faults]
