"""The matrix products of aten, computed by the kernels of a backend, below autograd.

A function takes the module of the backend (cpu.py, triton.py), then the arguments of the operator of torch. Tensors
have one dtype of float32, bfloat16 and float16, and any strides. The result is written into `out` if it is given.
Every element is summed in float32 and rounded once. Its bits are a function of the reduced dimension and the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor


def product(kernels, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """mm, bmm: a b."""
    return _multiply(kernels, out, a, b)


def added_product(kernels, addend: Tensor, a: Tensor, b: Tensor, *, beta=1, alpha=1, out: Tensor | None = None):
    """addmm, baddbmm: beta addend + alpha a b. With beta = 0 the addend is not read, and may hold NaN."""
    return _multiply(kernels, out, a, b, addend if beta != 0 else None, float(alpha), float(beta))


def vector_product(kernels, a: Tensor, x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """mv: a x."""
    return _as_one_row(kernels, out, a, x)


def added_vector_product(kernels, addend: Tensor, a: Tensor, x: Tensor, *, beta=1, alpha=1, out: Tensor | None = None):
    """addmv: beta addend + alpha a x."""
    return _as_one_row(kernels, out, a, x, addend if beta != 0 else None, float(alpha), float(beta))


def dot_product(kernels, x: Tensor, y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """dot: the sum of the products of the elements of x and y."""
    if x.shape != y.shape or x.dim() != 1:
        raise ValueError(
            f"tensor has shape {tuple(y.shape)}: it must be the shape of self, {tuple(x.shape)}, with one dimension"
        )
    if out is None:
        out = x.new_empty(())
    elif out.dim():
        raise ValueError(f"out has shape {tuple(out.shape)}: it must be ()")
    _multiply(kernels, out.view(1, 1), x[None], y[:, None])
    return out


def grouped_product(
    kernels,
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """_grouped_mm: the products of a batch, or of groups of rows, columns or terms.

    offs: [G] int32, the end of each group.
    """
    if bias is not None:
        raise ValueError("bias is a tensor: it must be None for grouped products")
    if out_dtype not in (None, a.dtype):
        raise ValueError(f"out_dtype is {out_dtype}: it must be the dtype of the operands, {a.dtype}")
    dims = (a.dim(), b.dim())
    if dims == (3, 3):
        return _multiply(kernels, None, a, b)
    if dims not in _GROUPED:
        raise ValueError(f"self and mat2 have {dims[0]} and {dims[1]} dimensions: they must have two or three each")
    if offs is None or offs.dim() != 1 or offs.dtype != torch.int32:
        raise ValueError("offs must be the end of each group, [G] int32, where self or mat2 has two dimensions")
    _check_dtypes(a, b)
    _check_depth(a.shape, b.shape)
    batch = {len(x) for x in (a, b) if x.dim() == 3}
    if batch - {len(offs)}:
        raise ValueError(f"offs has {len(offs)} groups: it must have {batch.pop()}, the batch size of self or mat2")
    grouped = _GROUPED[dims]
    shape = (a.shape[-2], b.shape[-1])
    out = torch.empty((len(offs), *shape) if grouped == "terms" else shape, dtype=a.dtype, device=a.device)
    if out.numel():
        kernels.grouped_into(out, a, b, offs.contiguous(), grouped)
    return out


# {(dimensions of a, dimensions of b): the dimension that is grouped}
_GROUPED = {(2, 3): "rows", (3, 2): "columns", (2, 2): "terms"}

# {operator of aten: its function}; every operator but _grouped_mm has an overload `out` too
OPERATORS: dict[str, Callable] = {
    "mm": product,
    "bmm": product,
    "addmm": added_product,
    "baddbmm": added_product,
    "mv": vector_product,
    "addmv": added_vector_product,
    "dot": dot_product,
    "_grouped_mm": grouped_product,
}
# {operator of aten: dimensions of its two factors}
_FACTORS = {
    "mm": (2, 2),
    "bmm": (3, 3),
    "addmm": (2, 2),
    "baddbmm": (3, 3),
    "mv": (2, 1),
    "addmv": (2, 1),
    "dot": (1, 1),
}
_WITH_ADDEND = ("addmm", "baddbmm", "addmv")


def operations(kernels: ModuleType) -> dict[str, Callable]:
    """{overload: function}. A function returns NotImplemented for a call that the kernels do not compute."""
    found: dict[str, Callable] = {}
    for name, function in OPERATORS.items():
        overloads = [name] if name == "_grouped_mm" else [name, f"{name}.out"]
        if name in _WITH_ADDEND:
            overloads.append(f"{name}_")
        found.update(dict.fromkeys(overloads, partial(_product, function, _FACTORS.get(name), kernels)))
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """aten::linear above autograd, by addmm for every layout of x.

    For some layouts torch itself rounds the product before it adds the bias.
    """
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
        # torch checks the shape of the addend even if the product is empty
        if len(args) == 2 and not (a.numel() and b.numel()) and not _expands(first, a, b):
            return NotImplemented
    if out is not None:
        kwargs["out"] = out
    try:
        return function(kernels, first, *args, **kwargs)
    except (TypeError, ValueError):  # the kernels do not take these arguments
        return NotImplemented


def _expands(addend: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `addend` broadcasts to the shape of the product of a and b."""
    shape = (*a.shape[:-1], *b.shape[a.dim() - 1 :])
    sizes = zip(reversed(addend.shape), reversed(shape), strict=False)
    return addend.dim() <= len(shape) and all(size in (1, wanted) for size, wanted in sizes)


def _as_one_row(kernels, out, a, x, addend=None, alpha=1.0, beta=1.0) -> Tensor:
    """a x, computed as x^T a^T: the kernels are faster with many columns than with one."""
    if a.dim() != 2 or x.dim() != 1:
        raise ValueError(f"self and vec have shapes {tuple(a.shape)} and {tuple(x.shape)}: they must be [M, K] and [K]")
    out = torch.empty(a.shape[:1], dtype=a.dtype, device=a.device) if out is None else out
    _multiply(kernels, out[None], x[None], a.T, addend, alpha, beta)
    return out


def _multiply(kernels, out, a, b, addend=None, alpha=1.0, beta=1.0) -> Tensor:
    _check_dtypes(a, b)
    shape = _shape_of_product(a.shape, b.shape)
    if out is None:
        out = a.new_empty(shape)
    elif out.shape != shape or out.dtype != a.dtype:
        raise ValueError(f"out has shape {tuple(out.shape)} and dtype {out.dtype}: it must be {shape}, {a.dtype}")
    if not out.numel():
        return out
    if addend is not None:
        if addend.dtype != a.dtype:
            raise TypeError(f"self has dtype {addend.dtype}: it must be the dtype of mat1, {a.dtype}")
        addend = _lay_out(addend, out)
    columns = shape[-1]
    row, column = out.stride()[-2:]
    if row == 1 and (column != 1 or columns == 1):
        # out^T = b^T a^T has the same bits: each sum has the same terms in the same order
        if addend is not None:
            addend = addend.expand(shape).mT.contiguous()
        kernels.matmul_into(out.mT, b.mT, a.mT, addend=addend, alpha=alpha, beta=beta)
    elif column == 1 or columns == 1:
        kernels.matmul_into(out, a, b, addend=addend, alpha=alpha, beta=beta)
    else:
        contiguous = torch.empty(shape, dtype=a.dtype, device=a.device)
        out.copy_(kernels.matmul_into(contiguous, a, b, addend=addend, alpha=alpha, beta=beta))
    return out


@lru_cache(maxsize=4096)  # packed batches have other sizes in each step
def _shape_of_product(a: torch.Size, b: torch.Size) -> tuple[int, ...]:
    """The shape of the product of tensors of the shapes a and b. Raises ValueError if they do not fit."""
    _check_depth(a, b)
    if a[:-2] != b[:-2]:
        raise ValueError(f"mat2 has shape {tuple(b)}: it must have the outer dimensions of self, {tuple(a)}")
    return (*a[:-1], b[-1])


def _check_dtypes(a: Tensor, b: Tensor) -> None:
    if b.dtype != a.dtype:
        raise TypeError(f"mat2 has dtype {b.dtype}: it must be the dtype of self, {a.dtype}")


def _check_depth(a: torch.Size, b: torch.Size) -> None:
    if b[-2] != a[-1]:
        raise ValueError(f"mat2 has shape {tuple(b)}: it must be [{a[-1]}, N] for self {tuple(a)}")


def _lay_out(addend, out) -> Tensor:
    """The addend for the kernels: [N] or the shape of out, last dimension contiguous, in memory other than out's."""
    if addend.shape != out.shape[-1:]:
        addend = addend.expand(out.shape)
    if addend.data_ptr() == out.data_ptr():
        return addend.clone(memory_format=torch.contiguous_format)
    return addend if addend.stride(-1) == 1 else addend.contiguous()
