"""Derives every random stream from the run's seed, a purpose and an index. No state is kept between steps."""

import hashlib

import torch


def derive_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A different 63-bit seed for each (seed, purpose, index)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, index))
