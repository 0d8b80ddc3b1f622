"""kept_logits on the CPU: calls the native kernel."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from .op import KeptRows


def keep_(logits: Tensor, kept: KeptRows) -> None:
    """Write -inf where a token is not in the set of its row. logits: [B, L, V] or [T, V], any dtype."""
    native().kept_logits(logits, kept.ids, kept.begin, kept.end)
