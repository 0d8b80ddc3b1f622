"""Tensors as rows, for kernels that address rows by two strides. A tensor is copied only if no view fits."""

from __future__ import annotations

import torch
from torch import Tensor


def moved_last(x: Tensor, dim: int) -> Tensor:
    """x with dimension `dim` moved to the end."""
    return x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)


def moved_back(x: Tensor, dim: int) -> Tensor:
    """The inverse of moved_last, for a result. It is contiguous, like torch's own results."""
    if dim in (-1, x.dim() - 1):
        return x
    # clone, unlike contiguous, also gives canonical strides to dimensions of size 1
    return x.movedim(-1, dim).clone(memory_format=torch.contiguous_format)


def rows_of(x: Tensor) -> Tensor:
    """x [..., D] of one dimension or more, unchanged if contiguous, else as [L, D] or [B, L, D] with D contiguous."""
    if x.is_contiguous():
        return x
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    return x.flatten(0, -3) if x.dim() > 3 else x


def matrices_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape [..., D], all as [L, D] or all as [B, L, D], with D contiguous."""
    rows = [rows_of(x) for x in tensors]
    if rows[0].dim() == 2:
        return rows
    if all(x.is_contiguous() for x in rows):
        return [x.view(-1, x.shape[-1]) for x in rows]
    return [x.flatten(0, -3) if x.dim() > 3 else x for x in rows]
