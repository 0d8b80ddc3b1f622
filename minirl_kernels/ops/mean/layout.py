"""The operand of a reduction as [B, L, R, I], reduced over R: either I is 1 and R contiguous, or I is contiguous."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The operand of a reduction as [batch, length, reduced, inner].

    x: the tensor that holds the elements.
    batch_stride, length_stride, reduced_stride: in elements.
    trailing: whether the last dimension is reduced.
    """

    x: Tensor
    batch: int
    length: int
    reduced: int
    inner: int
    batch_stride: int
    length_stride: int
    reduced_stride: int
    trailing: bool


def reduced_dims(x: Tensor, dim: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The reduced dimensions in ascending order, from 0 on. None and () mean all. A zero-dimensional x has none."""
    if x.dim() == 0:
        return ()
    if isinstance(dim, int):
        dim = (dim,)
    return tuple(sorted(d % x.dim() for d in dim)) if dim else tuple(range(x.dim()))


def reduced_shape(x: Tensor, dims: tuple[int, ...], keepdim: bool) -> list[int]:
    if keepdim:
        return [1 if d in dims else size for d, size in enumerate(x.shape)]
    return [size for d, size in enumerate(x.shape) if d not in dims]


def reduced(x: Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> tuple[tuple[int, ...], list[int]]:
    """(the reduced dimensions, the shape of the result), for a backend. They are kept, because they take long."""
    return _reduced(x.shape, dim if dim is None or isinstance(dim, int) else tuple(dim), keepdim)


@functools.lru_cache(1024)
def _reduced(shape: torch.Size, dim: int | tuple[int, ...] | None, keepdim: bool) -> tuple[tuple[int, ...], list[int]]:
    x = torch.empty(shape, device="meta")
    dims = reduced_dims(x, dim)
    return dims, reduced_shape(x, dims, keepdim)


def reduced_size(x: Tensor, dims: tuple[int, ...]) -> int:
    return math.prod([x.shape[d] for d in dims])


def layout_of(x: Tensor, dims: tuple[int, ...], *, transposes: bool) -> Layout:
    """The layout of x, or of a copy if no view of x has such strides.

    transposes: whether rows may be summed as columns and columns as rows. This needs kernels with equal bits for both.
    """
    if not dims:
        x, dims = x.reshape(1), (0,)
    elif dims[-1] - dims[0] >= len(dims):  # kept dimensions are between reduced dimensions
        x = x.movedim(dims, tuple(range(-len(dims), 0)))
        dims = tuple(range(x.dim() - len(dims), x.dim()))
    first, end = dims[0], dims[-1] + 1
    outer, reduced, inner = x.shape[:first], math.prod(x.shape[first:end]), math.prod(x.shape[end:])
    trailing = end == x.dim()
    if x.is_contiguous():
        return Layout(x, 1, math.prod(outer), reduced, inner, 0, reduced * inner, inner, trailing)
    x = x.reshape(math.prod(outer[:-1]), math.prod(outer[-1:]), reduced, inner)
    if not _fits(x):
        swapped = x.transpose(1, 3)  # exchanges rows and columns
        x = swapped if transposes and 1 in (x.shape[1], inner) and _fits(swapped) else x.contiguous()
    batch, length, reduced, inner = x.shape
    batch_stride, length_stride, reduced_stride, _ = x.stride()
    return Layout(x, batch, length, reduced, inner, batch_stride, length_stride, reduced_stride, trailing)


def _fits(x: Tensor) -> bool:
    """Whether the strides of x [B, L, R, I] fit a Layout. A dimension of one element may have any stride."""
    return (x.stride(3) == 1) if x.shape[3] > 1 else (x.stride(2) == 1 or x.shape[2] <= 1)
