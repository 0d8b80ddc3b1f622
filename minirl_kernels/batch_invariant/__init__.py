"""Batch-invariant mode: torch's operations give a row the same bits in every batch."""

from .audit import Audit, audit
from .mode import (
    batch_invariant_mode,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    follow_environment,
    is_batch_invariant,
)

__all__ = [
    "Audit",
    "audit",
    "batch_invariant_mode",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "is_batch_invariant",
]

follow_environment()
