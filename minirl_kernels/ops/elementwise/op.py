"""silu, sigmoid, softplus, gelu, mish: elementwise functions whose bits do not depend on where an element lies.

On a CPU torch computes most of a tensor in vectors and the rest (the last elements of a row or of a thread's share, and
whatever is strided) by other code, which for these functions rounds otherwise. Here all elements go through one path.
On a GPU torch has one path itself: there is no other backend than torch's own functions there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES, check_tensor
from ...common.library import Op, register
from . import aten, cpu
from .reference import REFERENCES

OP = Op(__package__)


def silu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x / (1 + e^-x). x: any shape and strides, float32, bfloat16 or float16. Returns x's shape and dtype.

    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    """
    return _elementwise("silu", x, backend)


def sigmoid(x: Tensor, *, backend: str = "auto") -> Tensor:
    """1 / (1 + e^-x). x, what is returned and what is raised: as in silu."""
    return _elementwise("sigmoid", x, backend)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0, *, backend: str = "auto") -> Tensor:
    """log(1 + e^(beta x)) / beta, and x itself where beta x > threshold. x and what is raised: as in silu.

    beta: above 0; threshold: any number.
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
    """x P(N <= x) of a standard normal N; x and what is raised: as in silu. arXiv 1606.08415.

    approximate: 'none', or 'tanh' for x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}: it must be 'none' or 'tanh'")
    return _elementwise("gelu" if approximate == "none" else "gelu_tanh", x, backend)


def mish(x: Tensor, *, backend: str = "auto") -> Tensor:
    """x tanh(log(1 + e^x)); x and what is raised: as in silu. arXiv 1908.08681."""
    return _elementwise("mish", x, backend)


def _elementwise(function: str, x: Tensor, backend: str, a: float = 0.0, b: float = 0.0) -> Tensor:
    check_tensor("x", x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}: it must be float32, bfloat16 or float16")
    if OP.resolve(backend, x.device, function) == "reference":
        return REFERENCES[function](x, a, b)
    return _Elementwise.apply(x, function, a, b)


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, a, b):
        ctx.save_for_backward(x)
        ctx.function = (function, a, b)
        return elementwise_forward(x, function, a, b)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return elementwise_backward(grad, x, *ctx.function), None, None, None


def _forward(x, function, a, b):
    return cpu.run(function, x, None, a, b)


def _backward(grad, x, function, a, b):
    return cpu.run(function, x, grad, a, b)


elementwise_forward = register(
    "elementwise(Tensor x, str function, float a, float b) -> Tensor", _forward, lambda x, *_: cpu.place_for(x)
)
elementwise_backward = register(
    "elementwise_backward(Tensor grad, Tensor x, str function, float a, float b) -> Tensor",
    _backward,
    lambda grad, x, *_: cpu.place_for_gradient(grad, x),
)
OP.override(aten.operations, "cpu")
