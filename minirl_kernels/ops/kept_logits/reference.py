"""Logits whose softmax is over the kept tokens, in eager torch: what is correct."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_logits_reference(logits: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """-inf where a token is not in its row's set ids[offsets[t]:offsets[t + 1]]; a row with an empty set as it is.

    logits [..., V], differentiable; the sets are those of the flattened rows.
    """
    counts = offsets.diff()
    rows = torch.arange(len(counts), device=ids.device).repeat_interleave(counts, output_size=len(ids))
    dropped = (counts > 0)[:, None].repeat(1, logits.shape[-1])
    # an id out of range is the caller's to report: its row is not read
    dropped[rows, ids.long().clamp(0, logits.shape[-1] - 1)] = False
    return logits.masked_fill(dropped.view(logits.shape), -torch.inf)
