"""softmax and log_softmax of rows, each a function of its row alone.

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
    """e^x / sum(e^x) along `dim`: of x's shape and dtype, computed in float32, differentiable.

    x: any shape of one dimension or more; float32, bfloat16 or float16; along the last dimension any strides of the
        others, along another one x is copied. -inf gives 0; a row of nothing but -inf gives NaN, as torch has it.
    The bits of a row depend on the row alone: not on its place, the others, the strides or the number of threads.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    """
    return _softmax(x, dim, False, backend)


def log_softmax(x: Tensor, dim: int = -1, *, backend: str = "auto") -> Tensor:
    """x - log(sum(e^x)) along `dim`, in nats: of x's shape and dtype, computed in float32, differentiable.

    x: as in softmax; -inf stays -inf, a row of nothing but -inf gives NaN.
    The bits of a row depend on the row alone.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
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


softmax_forward = OP.define("softmax(Tensor x, int dim, bool log, str backend) -> Tensor", _forward, _fake)
softmax_backward = OP.define(
    "softmax_backward(Tensor grad, Tensor output, int dim, bool log, str backend) -> Tensor", _backward, _fake
)
OP.override(aten.operations, "cpu", "triton")
