"""The reference for kept_logits, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_logits_reference(logits: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The logits, with -inf where a token is not in the set of its row. A row with an empty set is unchanged.

    logits: [..., V], differentiable. The set of row t of the flattened rows is ids[offsets[t]:offsets[t + 1]].
    """
    counts = offsets.diff()
    rows = torch.arange(len(counts), device=ids.device).repeat_interleave(counts, output_size=len(ids))
    dropped = (counts > 0)[:, None].repeat(1, logits.shape[-1])
    # the caller reports an id out of range, and does not read its row; the clamp only keeps the index valid
    dropped[rows, ids.long().clamp(0, logits.shape[-1] - 1)] = False
    return logits.masked_fill(dropped.view(logits.shape), -torch.inf)
