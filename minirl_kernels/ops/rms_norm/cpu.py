"""rms_norm on the CPU: allocate, call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.rows import rows_of


def forward(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(out, rstd [..., 1] float32): x * rstd * weight and 1 / sqrt(mean(x^2) + eps)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
    native().rms_norm(rows_of(x), _wide(weight), eps, out, rstd)
    return out, rstd


def backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, input_grad: bool, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """(d x, d weight float32), each empty where it is not asked for."""
    grad_x = torch.empty(x.shape if input_grad else (0,), dtype=x.dtype, device=x.device)
    grad_weight = torch.empty(x.shape[-1] if weight_grad else 0, dtype=torch.float32)
    native().rms_norm_backward(rows_of(x), rows_of(grad), _wide(weight), rstd, grad_x, grad_weight)
    return grad_x, grad_weight


def _wide(weight: Tensor | None) -> Tensor | None:
    """The kernels take a float32 weight: it is one row beside many."""
    return None if weight is None else weight.float().contiguous()
