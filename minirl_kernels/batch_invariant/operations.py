"""The operations of aten that become ours: by their overloads, in the arguments that torch calls them with.

Each takes the arguments of the operation and returns a new tensor. It returns NotImplemented for every call that is not
exactly one that ours computes: torch then computes it, or raises its own error. All but linear run below autograd.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..common.checks import FLOAT_DTYPES
from ..ops.matmul import aten as products
from .known import EXACT_POWERS

# Overloads that return a new tensor, by name: the overloads that write it into a given one, or into the first argument.
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
PRODUCTS = {
    "mm": ("mm.out",),
    "bmm": ("bmm.out",),
    "addmm": ("addmm.out", "addmm_"),
    "baddbmm": ("baddbmm.out", "baddbmm_"),
    "mv": ("mv.out",),
    "addmv": ("addmv.out", "addmv_"),
    "dot": ("dot.out",),
    "_grouped_mm": (),
}


# how many dimensions the factors have
_FACTORS = {
    "mm": (2, 2),
    "bmm": (3, 3),
    "addmm": (2, 2),
    "baddbmm": (3, 3),
    "mv": (2, 1),
    "addmv": (2, 1),
    "dot": (1, 1),
}


def operations(key: str) -> Iterator[tuple[str, Callable]]:
    """(overload, function that computes its result) for a dispatch key, "CPU" or "CUDA"."""
    folder = {"CPU": "cpu", "CUDA": "triton"}[key]

    def kernels(op: str):
        return importlib.import_module(f"..ops.{op}.{folder}", __package__)

    def with_others(names: dict[str, tuple[str, ...]], make: Callable[[str], Callable]):
        for name, others in names.items():
            function = make(name)
            for overload in (name, *others):
                yield overload, function

    matmul, softmax, mean = kernels("matmul"), kernels("softmax"), kernels("mean")
    yield from with_others(
        PRODUCTS, lambda name: partial(_product, products.OPERATORS[name], _FACTORS.get(name), matmul)
    )
    yield from with_others(
        _SOFTMAXES,
        lambda name: partial(_softmax_backward if name.endswith("_data") else _softmax, softmax, "log" in name),
    )
    yield from with_others(_REDUCTIONS, lambda name: partial(_reduction, mean, name.startswith("mean")))
    if key == "CUDA":  # on a CPU torch makes rms_norm of the operations above and below
        yield "_fused_rms_norm", partial(rms_norm, kernels("rms_norm"))
        yield "_fused_rms_norm_backward", partial(rms_norm_backward, kernels("rms_norm"))
    if key == "CPU":  # on a GPU one code computes every element
        elementwise = kernels("elementwise")
        yield from with_others(_ELEMENTWISE, lambda name: partial(_elementwise, getattr(elementwise, name)))
        powers = {"pow.Tensor_Scalar": ("pow.Tensor_Scalar_out", "pow_.Scalar")}
        yield from with_others(powers, lambda name: partial(_power, elementwise))


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The composite above autograd: torch rounds before it adds the bias where x is no matrix and not contiguous."""
    if (
        x.dim() == 0
        or weight.dim() != 2
        or bias.dim() != 1
        or x.shape[-1] != weight.shape[1]
        or len(bias) != len(weight)
    ):
        return NotImplemented
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    return torch.addmm(bias, rows, weight.t()).view(*x.shape[:-1], len(weight))


def _product(function: Callable, dims, kernels, first: Tensor, *args, out: Tensor | None = None, **kwargs) -> Tensor:
    if any(isinstance(x, Tensor) and x.dtype not in (first.dtype, torch.int32) for x in args):
        return NotImplemented
    if dims is not None:
        a, b = args if len(args) == 2 else (first, *args)
        if (a.dim(), b.dim()) != dims:
            return NotImplemented
        # of a sum of nothing too, torch checks the addend
        if len(args) == 2 and not (a.numel() and b.numel()) and not _expands(first, a, b):
            return NotImplemented
    if out is not None:
        kwargs["out"] = out
    try:
        return function(kernels, first, *args, **kwargs)
    except (TypeError, ValueError):  # out of the contract of our products
        return NotImplemented


def _expands(addend: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether it broadcasts to the shape of the product of a and b."""
    shape = (*a.shape[:-1], *b.shape[a.dim() - 1 :])
    sizes = zip(reversed(addend.shape), reversed(shape), strict=False)
    return addend.dim() <= len(shape) and all(size in (1, wanted) for size, wanted in sizes)


def _softmax(kernels, log: bool, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if not -x.dim() <= dim < x.dim() or (half_to_float and not _is_half_on_gpu(x)):
        return NotImplemented
    return kernels.forward(x, dim, log, torch.float32 if half_to_float else x.dtype)


def _softmax_backward(kernels, log: bool, grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if not -output.dim() <= dim < output.dim() or grad.dtype != output.dtype or grad.shape != output.shape:
        return NotImplemented
    if dtype != grad.dtype and not (grad.is_cuda and grad.dtype == torch.float32):
        return NotImplemented
    return kernels.backward(grad, output, dim, log, dtype)


def _is_half_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32


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


def rms_norm(kernels, x: Tensor, normalized_shape, weight: Tensor | None, eps: float | None):
    # torch has its own words for several dimensions, for weights of another dtype, and for no eps
    if len(normalized_shape) != 1 or eps is None or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    if not x.dim() or x.shape[-1] != normalized_shape[0] or (weight is not None and weight.shape != x.shape[-1:]):
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
    if dim:
        count = x.dim() or 1
        if not all(-count <= d < count for d in dim) or len({d % count for d in dim}) < len(dim):
            return NotImplemented
    return kernels.forward(x, dim, keepdim, dtype, divide)
