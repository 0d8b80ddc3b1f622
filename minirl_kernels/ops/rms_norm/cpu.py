"""CPU backend of rms_norm: allocates the results and calls the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.rows import rows_of


def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (out, rstd): x * rstd * weight, and 1 / sqrt(mean(x^2) + eps) as [..., 1] float32."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
    native().rms_norm(rows_of(x), _wide(weight), eps, out, rstd)
    return out, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Returns (d x, d weight as [H]), each empty unless `input_grad` or `weight_grad`.

    d weight has the dtype of weight, and float32 without a weight.
    """
    grad_x = torch.empty(x.shape if input_grad else (0,), dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(x.shape[-1] if weight_grad else 0, dtype=torch.float32)
    native().rms_norm_backward(rows_of(x), rows_of(grad), _wide(weight), rstd, grad_x, grad_weight)
    return grad_x, grad_weight if weight is None else grad_weight.to(weight.dtype)


def _wide(weight: Tensor | None) -> Tensor | None:
    """The weight in float32, as the kernels take it. The conversion is cheap: the weight is one row."""
    return None if weight is None else weight.float().contiguous()
