"""The sums and means of aten, computed by the kernels of a backend, below autograd and with the arguments of aten."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES


def operations(kernels: ModuleType) -> dict[str, Callable]:
    """{overload: function that computes its result}"""
    mean, sum = partial(_reduction, kernels, True), partial(_reduction, kernels, False)
    return {
        **dict.fromkeys(("mean", "mean.dim", "mean.out"), mean),
        **dict.fromkeys(("sum", "sum.dim_IntList", "sum.IntList_out"), sum),
    }


def _reduction(
    kernels, divide: bool, x: Tensor, dim=None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Returns NotImplemented for a call that the kernels do not compute."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        return NotImplemented
    if dim:
        count = x.dim() or 1
        if not all(-count <= d < count for d in dim) or len({d % count for d in dim}) < len(dim):
            return NotImplemented
    return kernels.forward(x, dim, keepdim, dtype, divide)
