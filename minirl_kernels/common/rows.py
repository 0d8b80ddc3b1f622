"""A tensor as rows, for kernels that reach them by two strides: a copy only where no view has them."""

from __future__ import annotations

import torch
from torch import Tensor


def moved_last(x: Tensor, dim: int) -> Tensor:
    return x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)


def moved_back(x: Tensor, dim: int) -> Tensor:
    """The inverse of moved_last, for a result: contiguous, as torch's own results are."""
    if dim in (-1, x.dim() - 1):
        return x
    return x.movedim(-1, dim).clone(memory_format=torch.contiguous_format)  # a dimension of size 1 keeps no odd stride


def rows_of(x: Tensor) -> Tensor:
    """x [..., D], at least one-dimensional, as a contiguous tensor or as [L, D] or [B, L, D] with D contiguous."""
    if x.is_contiguous():
        return x
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    return x.flatten(0, -3) if x.dim() > 3 else x


def matrices_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape [..., D] as [L, D] or [B, L, D], all alike, with D contiguous."""
    rows = [rows_of(x) for x in tensors]
    if all(x.is_contiguous() for x in rows):
        return [x.view(-1, x.shape[-1]) for x in rows]
    return [x.flatten(0, -3) if x.dim() > 3 else x for x in rows]
