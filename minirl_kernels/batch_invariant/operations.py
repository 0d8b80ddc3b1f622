"""The operations of aten that become ours: by their overloads, in the arguments that torch calls them with.

Each takes what the operation takes, and returns NotImplemented for what stays torch's. They run below autograd.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES
from ..ops.matmul import aten as products
from .known import EXACT_POWERS

# Overloads that return a new tensor, by name: those that write it into a given one, and into the first argument.
_SOFTMAXES = {
    "_softmax": ("_softmax.out",),
    "_log_softmax": ("_log_softmax.out",),
    "_softmax_backward_data": ("_softmax_backward_data.out",),
    "_log_softmax_backward_data": ("_log_softmax_backward_data.out",),
}
_REDUCTIONS = {"mean": (), "mean.dim": ("mean.out",), "sum": (), "sum.dim_IntList": ("sum.IntList_out",)}
_ELEMENTWISE = {
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
_PRODUCTS = {
    "mm": ("mm.out",),
    "bmm": ("bmm.out",),
    "addmm": ("addmm.out", "addmm_"),
    "baddbmm": ("baddbmm.out", "baddbmm_"),
    "mv": ("mv.out",),
    "addmv": ("addmv.out", "addmv_"),
    "dot": ("dot.out",),
    "_grouped_mm": (),
}


def operations(key: str) -> Iterator[tuple[str, Callable]]:
    """(overload, what computes it) for a dispatch key, "CPU" or "CUDA"."""
    folder = {"CPU": "cpu", "CUDA": "triton_kernel"}[key]

    def kernels(op: str):
        return importlib.import_module(f"..ops.{op}.{folder}", __package__)

    matmul, softmax, mean = kernels("matmul"), kernels("softmax"), kernels("mean")
    for name, others in _PRODUCTS.items():
        function = partial(_product, products.OPERATORS[name], matmul)
        yield name, function
        for other in others:
            yield other, partial(_product_in_place if other.endswith("_") else _product_into, function)
    for name, others in _SOFTMAXES.items():
        function = _softmax_backward if name.endswith("_data") else _softmax
        yield from _with_others(name, others, partial(function, softmax, "log" in name))
    for name, others in _REDUCTIONS.items():
        yield from _with_others(name, others, partial(_reduction, mean, name.startswith("mean")))
    if key == "CUDA":  # on a CPU torch makes rms_norm of the operations above and below
        yield "_fused_rms_norm", partial(rms_norm, kernels("rms_norm"))
        yield "_fused_rms_norm_backward", partial(rms_norm_backward, kernels("rms_norm"))
    if key == "CPU":  # on a GPU one code computes every element
        elementwise = kernels("elementwise")
        for name, others in _ELEMENTWISE.items():
            yield from _with_others(name, others, getattr(elementwise, name))
        powers = ("pow.Tensor_Scalar_out", "pow_.Scalar")
        yield from _with_others("pow.Tensor_Scalar", powers, partial(_power, elementwise))


def _with_others(name: str, others: tuple[str, ...], function: Callable) -> Iterator[tuple[str, Callable]]:
    yield name, function
    for other in others:
        in_place = other.partition(".")[0].endswith("_")
        yield other, partial(_in_place if in_place else _into, function)


def _into(function: Callable, *args, **kwargs) -> Tensor:
    """The argument for the result is the last keyword, by whatever name it goes."""
    name = next(name for name in ("out", "grad_input") if name in kwargs)
    target = kwargs.pop(name)
    result = function(*args, **kwargs)
    if result is NotImplemented:
        return result
    if target.shape != result.shape:
        target.resize_(result.shape)
    return target.copy_(result)


def _in_place(function: Callable, target: Tensor, *args, **kwargs) -> Tensor:
    result = function(target, *args, **kwargs)
    return result if result is NotImplemented else target.copy_(result)


def _product(function: Callable, kernels, first: Tensor, *args, **kwargs) -> Tensor:
    # torch has its own words for operands of two dtypes
    if any(isinstance(value, Tensor) and value.dtype not in (first.dtype, torch.int32) for value in args):
        return NotImplemented
    return function(kernels, first, *args, **kwargs)


def _product_into(function: Callable, *args, out: Tensor, **kwargs) -> Tensor:
    a, b = args[-2:]
    shape = (*a.shape[:-1], *b.shape[max(a.dim() - 1, 1) :])
    if out.dtype != a.dtype:
        return NotImplemented
    if out.shape != shape:
        out.resize_(shape)
    return function(*args, out=out, **kwargs)


def _product_in_place(function: Callable, target: Tensor, *args, **kwargs) -> Tensor:
    return function(target, *args, out=target, **kwargs)


def _softmax(kernels, log: bool, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if x.dim() == 0:
        return NotImplemented
    return kernels.forward(x, dim, log, torch.float32 if half_to_float else x.dtype)


def _softmax_backward(kernels, log: bool, grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if output.dim() == 0 or grad.dtype != output.dtype:
        return NotImplemented
    return kernels.backward(grad, output, dim, log, dtype)


def _power(kernels, x: Tensor, exponent: float) -> Tensor:
    return NotImplemented if exponent in EXACT_POWERS else kernels.pow(x, exponent)


def rms_norm(kernels, x: Tensor, normalized_shape, weight: Tensor | None, eps: float | None):
    # torch has its own words for several dimensions, for weights of another dtype, and for no eps
    if len(normalized_shape) != 1 or eps is None or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    return kernels.forward(x, weight, eps)


def rms_norm_backward(kernels, grad: Tensor, x: Tensor, normalized_shape, rstd: Tensor, weight: Tensor | None, mask):
    if len(normalized_shape) != 1 or grad.dtype != x.dtype or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    grad_x, grad_weight = kernels.backward(grad, x, weight, rstd, *mask)
    return grad_x, grad_weight.to(x.dtype)


def _reduction(kernels, divide: bool, x: Tensor, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return NotImplemented
    return kernels.forward(x, dim, keepdim, dtype, divide)
