"""Softmax and its logarithm in eager torch: what is correct."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_reference(x: Tensor, dim: int, log: bool) -> Tensor:
    """e^x / sum(e^x) along `dim`, or the logarithm of it; in float32 at least, rounded to the dtype of x at the end."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.log_softmax if log else torch.softmax)(wide, dim).to(x.dtype)
