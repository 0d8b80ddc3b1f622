"""CPU backend of mean and sum: allocates the result and calls the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .layout import layout_of, reduced


def forward(
    x: Tensor, dim: int | tuple[int, ...] | None, keepdim: bool, dtype: torch.dtype | None, divide: bool
) -> Tensor:
    """The mean of x over `dim` if `divide`, else the sum. dtype: of the result; None means the dtype of x."""
    if dtype not in (None, x.dtype, torch.float32):
        return forward(x, dim, keepdim, torch.float32, divide).to(dtype)
    dtype = dtype or x.dtype
    dims, shape = reduced(x, dim, keepdim)
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        layout = layout_of(x, dims, transposes=True)
        native().mean(layout, layout.reduced if divide else 1, out)
    return out
