"""matmul, linear and bmm: matrix products whose bits are a function of the reduced dimension and the dtype alone.

    matmul: out = a b            d a = (d out) b^T         d b = a^T (d out)
    linear: out = x W^T + bias   d x = (d out) W           d W = (d out)^T x       d bias = sum of d out over the rows
Sums are float32, and each output is rounded once. A row of out, d a or d x does not depend on the other rows. d b and
d W sum over the rows, and have equal bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES, check_device, check_tensor
from ...common.library import Op
from . import aten
from .reference import linear_reference, matmul_reference

OP = Op(__package__)


def matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """The product a b of two matrices, summed in float32 and rounded once.

    a: [M, K]; float32, bfloat16 or float16; any strides. A copy is made if neither dimension is contiguous.
    b: [K, N], of the dtype of a; any strides, as for a. Autocast casts a and b.
    Returns [M, N] of the dtype of a, differentiable twice.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of an output do not depend on M, N, its place, the strides or the number of threads.
    """
    return _product(a, b, 2, "matmul", backend)


def bmm(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """The products a[i] b[i] of a batch of matrices. Each has the bits of matmul, for every size of the batch.

    a: [B, M, K]; dtype and strides as in matmul.
    b: [B, K, N], of the dtype of a.
    Returns [B, M, N] of the dtype of a, differentiable twice.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    """
    return _product(a, b, 3, "bmm", backend)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x weight^T + bias, summed in float32 with the bias and rounded once.

    x: [..., K]; float32, bfloat16 or float16; any strides. A copy is made if neither of the last two dimensions is
        contiguous.
    weight: [N, K], of the dtype of x, any strides.
    bias: [N], of the dtype of x, or None. Autocast casts x, weight and bias.
    Returns [..., N] of the dtype of x, differentiable twice.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a row do not depend on the other rows, or on its place.
    """
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    x, weight, bias = _autocast(x, weight, bias)
    _check_dtype("x", x)
    if x.dim() == 0:
        raise ValueError("x has shape (): it must be [..., K]")
    _check_like("weight", weight, x, "x")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [N, {x.shape[-1]}], K of x")
    if bias is not None:
        _check_like("bias", bias, x, "x")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}: it must be ({weight.shape[0]},), N of weight")
    backend = OP.resolve(backend, x.device, "linear")
    if backend == "reference":
        return linear_reference(x, weight, bias)
    if x.dim() in (2, 3):
        return _Linear.apply(x, weight, bias, backend)
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, backend)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """linear in float32, without the last rounding and without a gradient: the logits of linear_token_logprobs.

    x: [..., K]; dtype and strides as in linear.
    weight: [N, K], of the dtype of x.
    bias: [N], of the dtype of x, or None. Autocast casts x, weight and bias.
    Returns [..., N] float32.
    Raises RuntimeError if the backend for the device of x is missing.
    """
    x, weight, bias = _autocast(x, weight, bias)
    backend = OP.resolve("auto", x.device, "float32_linear")
    if backend == "reference":
        return linear_reference(x.float(), weight.float(), None if bias is None else bias.float())
    rows = x.detach().flatten(0, -2)
    out = rows.new_empty(len(rows), len(weight), dtype=torch.float32)
    OP.kernels(backend).matmul_into(out, rows, weight.detach().T)
    return (out if bias is None else out.add_(bias)).view(*x.shape[:-1], len(weight))


def _product(a, b, dims, op, backend) -> Tensor:
    check_tensor("a", a)
    check_tensor("b", b)
    a, b = _autocast(a, b)
    _check_dtype("a", a)
    if a.dim() != dims:
        raise ValueError(f"a has shape {tuple(a.shape)}: it must be {'[M, K]' if dims == 2 else '[B, M, K]'}")
    _check_like("b", b, a, "a")
    if b.dim() != dims or b.shape[:-1] != (*a.shape[:-2], a.shape[-1]):
        expected = ", ".join(map(str, (*a.shape[:-2], a.shape[-1])))
        raise ValueError(f"b has shape {tuple(b.shape)}: it must be [{expected}, N] for this a")
    backend = OP.resolve(backend, a.device, op)
    if backend == "reference":
        return matmul_reference(a, b)
    return _Product.apply(a, b, backend)


def _autocast(*tensors) -> tuple:
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple([None if tensor is None else tensor.to(dtype) for tensor in tensors])


def _check_dtype(name, value) -> None:
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}: it must be float32, bfloat16 or float16")


def _check_like(name, value, other, name_of_other) -> None:
    if value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}: it must be the dtype of {name_of_other}, {other.dtype}")
    check_device(name, value, other.device)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, backend):
        ctx.save_for_backward(a, b)
        ctx.backend = backend
        return matmul_forward(a, b, backend)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        grad_a = _Product.apply(grad, b.mT, ctx.backend) if needs_a else None
        grad_b = _Product.apply(a.mT, grad, ctx.backend) if needs_b else None
        return grad_a, grad_b, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return linear_forward(x, weight, bias, backend)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_x = _Product.apply(rows, weight, ctx.backend).view(x.shape) if needs_x else None
        grad_weight = _Product.apply(rows.T, x.flatten(0, -2), ctx.backend) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None, None


def _linear(kernels, x, weight, bias):
    if x.dim() == 3:
        batch, length, _ = x.shape
        if batch > 1 and length > 1 and x.stride(0) != length * x.stride(1):
            # a batched product reads these strides without a copy
            return _of_columns(kernels, x, weight.T.expand(batch, *weight.shape[::-1]), bias)
        return _of_columns(kernels, x.flatten(0, 1), weight.T, bias).view(batch, length, weight.shape[0])
    return _of_columns(kernels, x, weight.T, bias)


def _of_columns(kernels, x, columns, bias):
    return aten.product(kernels, x, columns) if bias is None else aten.added_product(kernels, bias, x, columns)


matmul_forward = OP.define(
    "matmul(Tensor a, Tensor b, str backend) -> Tensor",
    aten.product,
    lambda a, b, _: a.new_empty((*a.shape[:-1], b.shape[-1])),
)
linear_forward = OP.define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _linear,
    lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
OP.override(aten.operations, "cpu", "triton")
