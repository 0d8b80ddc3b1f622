"""The reference for the logits of a linear head, in eager torch. It makes all logits at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """softcap * tanh(u / softcap), or u if softcap is 0, with u = hidden weight^T + bias in float32 or float64.

    hidden [..., H], weight [V, H], bias [V] -> [..., V], differentiable.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return softcap * torch.tanh(logits / softcap) if softcap else logits
