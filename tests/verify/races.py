"""A program does not overwrite an element that another of its threads may still have to read.

The interpreter runs a program as one thread. On hardware the warps of a program drift apart until a barrier. An
element that is read and written at the same width stays with its thread; elements of another width over the same
memory do not.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from verify.case import Case
from verify.interpreter import Access, Launch, recorded

UNIT = 2  # bytes of the narrowest element


def races(launch: Launch) -> list[str]:
    """Programs that load an element which they have stored, or overwrite one that they have loaded at another width.

    A barrier ends the second kind: the loads before it are done.
    """
    overwriting, rereading = [], []
    for program, accesses in groupby(launch.accesses, key=lambda access: access.program):
        loaded, stored = [], []
        for access in accesses:
            if access.kind == "barrier":
                loaded.clear()
            elif access.kind == "load":
                loaded.append(access)
                rereading += [program for earlier in stored if _overlap(earlier, access)]
            else:
                stored.append(access)
                others = [earlier for earlier in loaded if earlier.size != access.size]
                overwriting += [program for earlier in others if _overlap(earlier, access)]
    return [
        f"{launch.kernel}: {len(set(programs))} programs {fault}, the first of them {programs[0]}"
        for programs, fault in (
            (overwriting, "overwrite what their threads may still have to read"),
            (rereading, "read what they have overwritten"),
        )
        if programs
    ]


def check(case: Case) -> list[str]:
    launches, _ = recorded(case)
    return [f"{case}: {fault}" for launch in launches for fault in races(launch)]


def _overlap(a: Access, b: Access) -> bool:
    a_units, b_units = _units(a), _units(b)
    if not (len(a_units) and len(b_units)) or a_units.max() < b_units.min() or b_units.max() < a_units.min():
        return False
    return bool(np.isin(a_units, b_units).any())


def _units(access: Access) -> np.ndarray:
    """The address of every UNIT bytes that the access touches."""
    return (access.addresses[:, None] + np.arange(0, access.size, UNIT, dtype=np.uint64)).ravel()
