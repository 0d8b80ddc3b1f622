"""Reference of mean and sum, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_reference(x: Tensor, dims: tuple[int, ...], keepdim: bool, dtype: torch.dtype, divide: bool) -> Tensor:
    """The mean of x over `dims` if `divide`, else the sum; in float32 or wider, rounded once to `dtype`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.mean if divide else torch.sum)(wide, dims, keepdim).to(dtype)
