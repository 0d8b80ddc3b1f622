"""mean and sum over dimensions, in an order that is a function of the number of elements and the dtype alone.

For R reduced elements:  sum = sum_r x_r,  d x_r = d sum;  mean = sum / R,  d x_r = d mean / R
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES, check_dim, check_floats
from ...common.library import Op
from . import aten
from .layout import reduced_dims, reduced_shape, reduced_size
from .reference import mean_reference

OP = Op(__package__)


def mean(
    x: Tensor,
    dim: int | tuple[int, ...] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The mean of x over `dim`, summed in float32 and rounded once; differentiable.

    x: any shape and strides; float32, bfloat16 or float16. The mean of no elements is NaN.
    dim: an integer, a tuple of integers, or None for all dimensions. Several dimensions are reduced as one, in their
        order in the shape.
    keepdim: whether the reduced dimensions stay, with size 1.
    dtype: of the result; float32, bfloat16 or float16. None means the dtype of x.
    Returns the mean, of the given dtype.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a result depend on its elements, their number and their dtype alone. On a GPU a reduction that includes
    the last dimension has another order of summation than a reduction that does not, and so other bits.
    """
    return _reduce(x, dim, keepdim, dtype, True, backend)


def sum(
    x: Tensor,
    dim: int | tuple[int, ...] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum of x over `dim`, in float32 and rounded once; differentiable. The sum of no elements is 0.

    x, dim, keepdim, dtype: as in mean.
    Returns the sum, of the given dtype.
    Raises the same errors as mean.
    """
    return _reduce(x, dim, keepdim, dtype, False, backend)


def _reduce(x, dim, keepdim, dtype, divide, backend):
    check_floats("x", x)
    dims = _checked_dims(x, dim)
    if dtype is None:
        dtype = x.dtype
    elif dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype is {dtype!r}: it must be float32, bfloat16, float16 or None")
    backend = OP.resolve(backend, x.device, "mean" if divide else "sum")
    if backend == "reference":
        return mean_reference(x, dims, keepdim, dtype, divide)
    return _Mean.apply(x, dims, keepdim, dtype, divide, backend)


def _checked_dims(x, dim) -> tuple[int, ...]:
    given = () if dim is None else (dim,) if isinstance(dim, int) else dim
    if not isinstance(given, (tuple, list)):
        raise TypeError(f"dim is {dim!r}: it must be an integer, a tuple of integers or None")
    for one in given:
        check_dim("dim", one, x)
    dims = reduced_dims(x, tuple(given))
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim is {dim}: its dimensions must be different")
    return dims


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dims, keepdim, dtype, divide, backend):
        ctx.dims, ctx.unsqueezed = dims, () if keepdim else dims
        ctx.shape, ctx.dtype, ctx.divisor = x.shape, x.dtype, reduced_size(x, dims) if divide else 1
        return mean_forward(x, dims, keepdim, dtype, divide, backend)

    @staticmethod
    def backward(ctx, grad):
        for d in ctx.unsqueezed:
            grad = grad.unsqueeze(d)
        if ctx.divisor != 1:
            grad = grad.to(torch.promote_types(grad.dtype, ctx.dtype)) / ctx.divisor
        return grad.to(ctx.dtype).expand(ctx.shape), None, None, None, None, None


def _forward(kernels, x, dim, keepdim, dtype, divide):
    return kernels.forward(x, dim, keepdim, dtype, divide)


def _fake(x, dim, keepdim, dtype, divide, backend):
    return x.new_empty(reduced_shape(x, reduced_dims(x, dim), keepdim), dtype=dtype)


mean_forward = OP.define(
    "mean(Tensor x, int[] dim, bool keepdim, ScalarType dtype, bool divide, str backend) -> Tensor", _forward, _fake
)
OP.override(aten.operations, "cpu", "triton")
