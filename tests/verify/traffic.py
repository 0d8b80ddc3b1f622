"""Bytes that a launch moves, against the most that it may: each input and each output once.

The input of a product counts once for each tile that needs it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from verify.case import Case
from verify.interpreter import Launch, recording


class Traffic(NamedTuple):
    """Bytes over all active lanes; atomics count as both."""

    loaded: int
    stored: int


def traffic(*launches: Launch) -> Traffic:
    """Bytes that all of the launches move together."""
    return Traffic(
        sum(int(launch.addresses("load", "atomic")[2].sum()) for launch in launches),
        sum(int(launch.addresses("store", "atomic")[2].sum()) for launch in launches),
    )


def measure(case: Case) -> tuple[Traffic, Traffic]:
    """(the bytes that the case moves, the most that it may move)."""
    with recording() as launches:
        outputs = case.run()
    programs = sum(math.prod(launch.grid) for launch in launches)
    stored = sum(output.numel() * output.element_size() for output in outputs)
    return traffic(*launches), Traffic(case.most_loaded(programs), stored)


def check(case: Case) -> list[str]:
    moved, allowed = measure(case)
    return [
        f"{case}: {name} {here:,} bytes where {bound:,} are enough"
        for name, here, bound in zip(("loads", "stores"), moved, allowed, strict=True)
        if here > bound
    ]
