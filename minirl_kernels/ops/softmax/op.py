"""softmax and log_softmax: the bits of a result row depend on its own row alone.

p = e^(x - max x) / sum(e^(x - max x))      d x = p (g - sum(p g))      for p = softmax(x)
q = x - max x - log sum(e^(x - max x))      d x = g - e^q sum(g)        for q = log_softmax(x)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import check_dim, check_floats
from ...common.library import Op
from . import aten
from .reference import softmax_reference

OP = Op(__package__)


def softmax(x: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """e^x / sum(e^x) along `dim`, computed in float32 and rounded once; differentiable.

    x: one dimension or more; float32, bfloat16 or float16; any strides. -inf gives 0; a row of -inf alone gives NaN, as
        in torch.
    dim: the dimension of the rows. x is copied unless it is contiguous along dim.
    Returns the shape and dtype of x.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a row do not depend on its place, the other rows, the strides or the number of threads.
    """
    return _softmax(x, dim, False, backend)


def log_softmax(x: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """x - log(sum(e^x)) along `dim`, in nats, computed in float32 and rounded once; differentiable.

    x: as in softmax. -inf stays -inf; a row of -inf alone gives NaN.
    dim: as in softmax.
    Returns the shape and dtype of x.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a row depend on that row alone.
    """
    return _softmax(x, dim, True, backend)


def _softmax(x, dim, log, backend):
    check_floats("x", x)
    check_dim("dim", dim, x)
    backend = OP.resolve(backend, x.device, "log_softmax" if log else "softmax")
    if backend == "reference":
        return softmax_reference(x, dim, log)
    return _Softmax.apply(x, dim, log, backend)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, log, backend):
        out = softmax_forward(x, dim, log, backend)
        ctx.save_for_backward(out)
        ctx.arguments = (dim, log, backend)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return softmax_backward(grad, out, *ctx.arguments), None, None, None


def _forward(kernels, x, dim, log):
    return kernels.forward(x, dim, log, x.dtype)


def _backward(kernels, grad, output, dim, log):
    return kernels.backward(grad, output, dim, log, output.dtype)


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(grad, output, dim, *_):
    return torch.empty_like(grad.movedim(dim, -1), memory_format=torch.contiguous_format).movedim(-1, dim)


softmax_forward = OP.define("softmax(Tensor x, int dim, bool log, str backend) -> Tensor", _forward, _fake)
softmax_backward = OP.define(
    "softmax_backward(Tensor grad, Tensor output, int dim, bool log, str backend) -> Tensor", _backward, _backward_fake
)
OP.override(aten.operations, "cpu", "triton")
