"""Logits of a language model's head, in eager torch: what is correct. This is the one place that has all of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """u = hidden weight^T + bias in float32 (float64 if they are); softcap * tanh(u / softcap) unless softcap is 0.

    hidden [..., H], weight [V, H], bias [V] -> [..., V], differentiable.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return softcap * torch.tanh(logits / softcap) if softcap else logits
