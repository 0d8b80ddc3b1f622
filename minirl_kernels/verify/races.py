"""Inside a program: nothing is overwritten that another of its threads may still have to read.

The interpreter runs a program as one thread; on hardware its warps drift apart until a barrier. An element that is
read and written as it is stays with its thread. Elements of another width over the same memory do not.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from .cases import AnyCase
from .interpreter import Access, Launch, recorded

UNIT = 2  # bytes of the narrowest element


def races(launch: Launch) -> list[str]:
    """Programs that store over what they have loaded at another width since their last barrier, or load what they have
    stored."""
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
        f"{launch.kernel}: {len(set(programs))} programs {what}, the first of them {programs[0]}"
        for programs, what in (
            (overwriting, "overwrite what their threads may still have to read"),
            (rereading, "read what they have overwritten"),
        )
        if programs
    ]


def check(case: AnyCase) -> list[str]:
    launches, _ = recorded(case)
    return [f"{case}: {fault}" for launch in launches for fault in races(launch)]


def _overlap(a: Access, b: Access) -> bool:
    a_units, b_units = _units(a), _units(b)
    if not (len(a_units) and len(b_units)) or a_units.max() < b_units.min() or b_units.max() < a_units.min():
        return False
    return bool(np.isin(a_units, b_units).any())


def _units(access: Access) -> np.ndarray:
    """Every UNIT bytes that it touches."""
    return (access.addresses[:, None] + np.arange(0, access.size, UNIT, dtype=np.uint64)).ravel()
