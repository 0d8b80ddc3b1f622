"""Arithmetic of sizes on the host. Triton's functions of these names take microseconds, a good part of a launch."""

from __future__ import annotations


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()
