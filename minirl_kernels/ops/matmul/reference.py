"""References of the matrix products, in eager torch: float32 sums (float64 for float64 operands), rounded once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """The product a b of a [M, K] and b [K, N], or of a [B, M, K] and b [B, K, N]. Differentiable."""
    wide = torch.promote_types(a.dtype, torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return (a.to(wide) @ b.to(wide)).to(a.dtype)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, with x [..., K], weight [N, K] and bias [N] or None. Differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)
