"""rms_norm: each row divided by its root mean square, times a weight.

y = x rstd,  rstd = 1 / sqrt(mean(x^2) + eps),  out = y weight         (Zhang and Sennrich, arXiv 1910.07467)
d x = rstd (g - y mean(g y)),  g = d out weight;  d weight = sum over rows of d out y
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES, check_floats, check_like
from ...common.library import Op
from . import aten
from .reference import rms_norm_reference

OP = Op(__package__)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 and rounded once; differentiable.

    x: [..., H]; float32, bfloat16 or float16; any strides of the outer dimensions.
    weight: [H]; float32, bfloat16 or float16; None means 1.
    eps: a finite number from 0 on, in units of x squared.
    Returns the shape and dtype of x.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a row of the result, and of d x, depend on that row and the weight alone. d weight is a sum over the
    rows, in an order that is a function of their number.
    """
    check_floats("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (): it must have one dimension or more")
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: its last dimension must not be empty")
    if weight is not None:
        check_like("weight", weight, x.shape[-1:], x.device)
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(f"weight has dtype {weight.dtype}: it must be float32, bfloat16 or float16")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps is {eps!r}: it must be a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps}: it must be from 0 on, and finite")
    backend = OP.resolve(backend, x.device)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps)
    return _RmsNorm.apply(x, weight, float(eps), backend)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, backend):
        out, rstd = rms_norm_forward(x, weight, eps, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x, grad_weight = rms_norm_backward(grad, x, weight, rstd, needs_x, needs_weight, ctx.backend)
        return grad_x if needs_x else None, grad_weight if needs_weight else None, None, None


def _forward(kernels, x, weight, eps):
    return kernels.forward(x, weight, eps)


def _forward_fake(x, weight, eps, backend):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _backward(kernels, grad, x, weight, rstd, input_grad, weight_grad):
    return kernels.backward(grad, x, weight, rstd, input_grad, weight_grad)


def _backward_fake(grad, x, weight, rstd, input_grad, weight_grad, backend):
    grad_x = x.new_empty(x.shape if input_grad else (0,))
    return grad_x, (rstd if weight is None else weight).new_empty(x.shape[-1:] if weight_grad else (0,))


rms_norm_forward = OP.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, str backend) -> (Tensor out, Tensor rstd)", _forward, _forward_fake
)
rms_norm_backward = OP.define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor rstd, bool input_grad, bool weight_grad, "
    "str backend) -> (Tensor grad_x, Tensor grad_weight)",
    _backward,
    _backward_fake,
)
OP.override(aten.operations, "triton")
