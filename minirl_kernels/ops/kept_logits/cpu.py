"""kept_logits on the CPU: call the native kernel."""

from __future__ import annotations

from torch import Tensor

from ...backends import native
from .op import KeptRows


def keep_(logits: Tensor, kept: KeptRows) -> None:
    """-inf where a token is not in its row's set; logits [B, L, V] or [T, V], any dtype."""
    batch = logits.shape[0] if logits.dim() == 3 else 1
    native().kept_logits(
        logits.data_ptr(),
        str(logits.dtype),
        batch,
        logits.shape[-2],
        logits.shape[-1],
        logits.stride(0) if logits.dim() == 3 else 0,
        logits.stride(-2),
        kept.ids.data_ptr(),
        kept.begin.data_ptr(),
        kept.end.data_ptr(),
    )
