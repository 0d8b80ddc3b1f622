"""Bytes that a launch moves, against the floor: each input once (once for each tile of a product), each output once."""

from __future__ import annotations

import math
from typing import NamedTuple

from .cases import AnyCase
from .interpreter import Launch, recording


class Traffic(NamedTuple):
    """Bytes over all active lanes; atomics count as both."""

    loaded: int
    stored: int


def traffic(*launches: Launch) -> Traffic:
    """Of one launch, or of several together."""
    return Traffic(
        sum(int(launch.addresses("load", "atomic")[2].sum()) for launch in launches),
        sum(int(launch.addresses("store", "atomic")[2].sum()) for launch in launches),
    )


def measure(case: AnyCase) -> tuple[Traffic, Traffic]:
    """(what the case moves, what it may move at most)."""
    with recording() as launches:
        outputs = case.run()
    programs = sum(math.prod(launch.grid) for launch in launches)
    stored = sum(output.numel() * output.element_size() for output in outputs)
    return traffic(*launches), Traffic(case.most_loaded(programs), stored)


def check(case: AnyCase) -> list[str]:
    moved, allowed = measure(case)
    return [
        f"{case}: {name} {here:,} bytes where {bound:,} are enough"
        for name, here, bound in zip(("loads", "stores"), moved, allowed, strict=True)
        if here > bound
    ]
