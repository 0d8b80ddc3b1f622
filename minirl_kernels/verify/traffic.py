"""How many bytes a launch moves, against the floor of each input read once and each output written once."""

from __future__ import annotations

import math
from typing import NamedTuple

from .cases import Case
from .interpreter import Launch, recording

# what a program reads beside logits: its token's id, temperature, gradient, ...
BYTES_OF_A_TOKEN = 64


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


def measure(case: Case) -> tuple[Traffic, Traffic]:
    """(what the case moves, what its kernel may move at most)."""
    with recording() as launches:
        outputs = case.kernel.call(case.rows())
    logits = case.rows().logits.numel() * case.dtype.itemsize
    tokens = BYTES_OF_A_TOKEN * sum(math.prod(launch.grid) for launch in launches)
    loaded = case.kernel.reads(case.config, case.vocab_size) * logits + tokens
    stored = sum(output.numel() * output.element_size() for output in outputs)
    return traffic(*launches), Traffic(int(loaded), stored)


def check(case: Case) -> list[str]:
    moved, allowed = measure(case)
    return [
        f"{case}: {name} {here:,} bytes where {bound:,} are enough"
        for name, here, bound in zip(("loads", "stores"), moved, allowed, strict=True)
        if here > bound
    ]
