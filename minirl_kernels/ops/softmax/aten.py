"""The softmax operations of aten, computed by the kernels of a backend, below autograd.

A function returns NotImplemented for a call that the kernels do not compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import Tensor


def operations(kernels: ModuleType) -> dict[str, Callable]:
    """{overload: function that computes its result}"""
    found: dict[str, Callable] = {}
    for name, log in (("_softmax", False), ("_log_softmax", True)):
        found[name] = found[f"{name}.out"] = partial(_softmax, kernels, log)
        backward = f"{name}_backward_data"
        found[backward] = found[f"{backward}.out"] = partial(_softmax_backward, kernels, log)
    return found


def _softmax(kernels, log: bool, x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if not -x.dim() <= dim < x.dim() or (half_to_float and not _is_half_on_gpu(x)):
        return NotImplemented
    return kernels.forward(x, dim, log, torch.float32 if half_to_float else x.dtype)


def _softmax_backward(kernels, log: bool, grad: Tensor, output: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if not -output.dim() <= dim < output.dim() or grad.dtype != output.dtype or grad.shape != output.shape:
        return NotImplemented
    if dtype != grad.dtype and not (grad.is_cuda and grad.dtype == torch.float32):
        return NotImplemented
    grad_x = kernels.backward(grad, output, dim, log, dtype)
    # torch's own result is contiguous
    return grad_x if dim in (-1, grad_x.dim() - 1) else grad_x.clone(memory_format=torch.contiguous_format)


def _is_half_on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float32
