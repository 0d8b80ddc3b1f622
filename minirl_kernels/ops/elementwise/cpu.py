"""CPU backend of the elementwise functions, with the arguments of the aten operations of the same names.

The bits of a result depend on the value of its element alone. Its place, the number of elements, the strides and the
number of threads do not matter. Tensors have any shape and strides; the result has the strides of torch's own result. A
gradient is converted to the dtype and the strides of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .layout import place_for, place_for_gradient


def exp2(x: Tensor) -> Tensor:
    return run("exp2", x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return run("gelu" if approximate == "none" else "gelu_tanh", x)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    return run("gelu" if approximate == "none" else "gelu_tanh", x, grad)


def mish(x: Tensor) -> Tensor:
    return run("mish", x)


def mish_backward(grad: Tensor, x: Tensor) -> Tensor:
    return run("mish", x, grad)


def pow(x: Tensor, exponent: float) -> Tensor:
    return run("pow", x, None, float(exponent))


def rsqrt(x: Tensor) -> Tensor:
    return run("rsqrt", x)


def sigmoid(x: Tensor) -> Tensor:
    return run("sigmoid", x)


def silu(x: Tensor) -> Tensor:
    return run("silu", x)


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return run("silu", x, grad)


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    return run("softplus", x, None, float(beta), float(threshold))


def softplus_backward(grad: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    return run("softplus", x, grad, float(beta), float(threshold))


def run(function: str, x: Tensor, grad: Tensor | None = None, a: float = 0.0, b: float = 0.0) -> Tensor:
    """f(x), or grad * f'(x) if grad is given. a and b are the numeric parameters of the function, if it has any."""
    out = place_for(x) if grad is None else place_for_gradient(grad, x)
    x = _in_memory_as(out, x)
    if grad is not None:
        grad = _in_memory_as(out, grad)
    native().elementwise(function, x, grad, out, a, b)
    return out


def _in_memory_as(out: Tensor, values: Tensor) -> Tensor:
    """`values` with the dtype and strides of `out`, copied if they differ."""
    if values.dtype == out.dtype and values.stride() == out.stride():
        return values
    return torch.empty_like(out).copy_(values)
