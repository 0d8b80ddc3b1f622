"""kept_logits on the CPU: call the native kernel."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from .op import KeptRows


def keep_(logits: Tensor, kept: KeptRows) -> None:
    """-inf where a token is not in its row's set; logits [B, L, V] or [T, V], any dtype."""
    native().kept_logits(logits, kept.ids, kept.begin, kept.end)
