"""The elementwise operations of aten, computed by the CPU kernels, below autograd and with the arguments of aten.

A function returns NotImplemented for a call that the kernels do not compute. GPUs need no replacement: there, torch
computes all elements by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

from torch import Tensor

# Powers that torch computes by products, quotients or square roots.
EXACT_POWERS = (-2, -1, 0, 0.5, 1, 2, 3)

# {overload that returns a new tensor: overloads that write the result into a given tensor or into the first argument}
_OVERLOADS: dict[str, tuple[str, ...]] = {
    "exp2": ("exp2.out", "exp2_"),
    "gelu": ("gelu.out", "gelu_"),
    "gelu_backward": ("gelu_backward.grad_input",),
    "mish": ("mish.out", "mish_"),
    "mish_backward": (),
    "rsqrt": ("rsqrt.out", "rsqrt_"),
    "sigmoid": ("sigmoid.out", "sigmoid_"),
    "silu": ("silu.out", "silu_"),
    "silu_backward": ("silu_backward.grad_input",),
    "softplus": ("softplus.out",),
    "softplus_backward": ("softplus_backward.grad_input",),
}


def operations(kernels: ModuleType) -> dict[str, Callable]:
    """{overload: function that computes its result}"""
    powers = ("pow.Tensor_Scalar", "pow.Tensor_Scalar_out", "pow_.Scalar")
    found: dict[str, Callable] = dict.fromkeys(powers, partial(_power, kernels))
    for name, others in _OVERLOADS.items():
        found.update(dict.fromkeys((name, *others), partial(_elementwise, getattr(kernels, name))))
    return found


def _elementwise(function: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    if args:
        grad, x_of_grad = x, args[0]
        if isinstance(x_of_grad, Tensor) and (x_of_grad.shape != grad.shape or x_of_grad.dtype != grad.dtype):
            return NotImplemented
        if complex in map(type, args):
            return NotImplemented
    if kwargs and kwargs.get("approximate", "none") not in ("none", "tanh"):
        return NotImplemented
    return function(x, *args, **kwargs)


def _power(kernels, x: Tensor, exponent: float) -> Tensor:
    if isinstance(exponent, complex) or exponent in EXACT_POWERS:
        return NotImplemented
    return kernels.pow(x, exponent)
