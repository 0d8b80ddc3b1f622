"""silu, sigmoid, softplus, gelu, mish: elementwise functions whose bits do not depend on the place of an element.

On a CPU, torch computes most elements in vectors, and the rest by scalar code: the last elements of a row or of a
thread's share, and strided elements. For these functions the scalar code rounds differently. Here every element goes
through the same code. On a GPU torch itself has one code path, so its own functions are the only backend there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES, check_tensor
from ...common.library import Op
from . import aten
from .layout import place_for, place_for_gradient
from .reference import REFERENCES

OP = Op(__package__)


def silu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(x) = x / (1 + e^-x), differentiable.

    x: any shape and strides; float32, bfloat16 or float16.
    Returns the shape and dtype of x.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    """
    return _elementwise("silu", x, backend)


def sigmoid(x: Tensor, *, backend: str = "auto") -> Tensor:
    """sigmoid(x) = 1 / (1 + e^-x), differentiable. Argument, result and errors as in silu."""
    return _elementwise("sigmoid", x, backend)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0, *, backend: str = "auto") -> Tensor:
    """softplus(x) = log(1 + e^(beta x)) / beta, and x itself where beta x > threshold; differentiable.

    x: any shape and strides; float32, bfloat16 or float16.
    beta: a number above 0.
    threshold: any number.
    Returns the shape and dtype of x.
    Raises the same errors as silu.
    """
    for name, number in (("beta", beta), ("threshold", threshold)):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} is {number!r}: it must be a number")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta is {beta}: it must be above 0 and finite")
    if math.isnan(threshold):
        raise ValueError("threshold is nan: it must be a number")
    return _elementwise("softplus", x, backend, float(beta), float(threshold))


def gelu(x: Tensor, *, approximate: str = "none", backend: str = "auto") -> Tensor:
    """gelu(x) = x P(N <= x) for a standard normal N (arXiv 1606.08415), differentiable.

    x: any shape and strides; float32, bfloat16 or float16.
    approximate: 'none', or 'tanh' for x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    Returns the shape and dtype of x.
    Raises the same errors as silu.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}: it must be 'none' or 'tanh'")
    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", x, backend)


def mish(x: Tensor, *, backend: str = "auto") -> Tensor:
    """mish(x) = x tanh(log(1 + e^x)) (arXiv 1908.08681), differentiable. Argument, result and errors as in silu."""
    return _elementwise("mish", x, backend)


def _elementwise(function: str, x: Tensor, backend: str, a: float = 0.0, b: float = 0.0) -> Tensor:
    check_tensor("x", x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: it must be float32, bfloat16 or float16")
    backend = OP.resolve(backend, x.device, function)
    if backend == "reference":
        return REFERENCES[function](x, a, b)
    return _Elementwise.apply(x, function, a, b, backend)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, a, b, backend):
        ctx.save_for_backward(x)
        ctx.arguments = (function, a, b, backend)
        return elementwise_forward(x, function, a, b, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return elementwise_backward(grad, x, *ctx.arguments), None, None, None, None


def _forward(kernels, x, function, a, b):
    return kernels.run(function, x, None, a, b)


def _backward(kernels, grad, x, function, a, b):
    return kernels.run(function, x, grad, a, b)


elementwise_forward = OP.define(
    "elementwise(Tensor x, str function, float a, float b, str backend) -> Tensor",
    _forward,
    lambda x, *_: place_for(x),
)
elementwise_backward = OP.define(
    "elementwise_backward(Tensor grad, Tensor x, str function, float a, float b, str backend) -> Tensor",
    _backward,
    lambda grad, x, *_: place_for_gradient(grad, x),
)
OP.override(aten.operations, "cpu")
