"""Mean and sum over dimensions in eager torch: what is correct."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_reference(x: Tensor, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype, divide: bool) -> Tensor:
    """The mean where `divide`, else the sum; summed in float32 at least and rounded to `dtype`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.mean if divide else torch.sum)(wide, dims, keepdim).to(dtype)
