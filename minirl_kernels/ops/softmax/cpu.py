"""CPU backend of softmax: allocates the results and calls the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.rows import moved_back, moved_last, rows_of


def forward(x: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """softmax of x along `dim`, or its logarithm if `log`. dtype: of the result; the dtype of x, or float32."""
    x = moved_last(x, dim)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        native().softmax(rows_of(x), out, log)
    return moved_back(out, dim)


def backward(grad: Tensor, output: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    """d x along `dim`, from the gradient of the output and the output, which have one dtype.

    dtype: of x and of d x; the dtype of the output, or a 16-bit dtype.
    d x is contiguous along `dim`, because autograd takes a gradient of any strides.
    """
    grad, output = moved_last(grad, dim), moved_last(output, dim)
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.numel():
        native().softmax_backward(rows_of(grad), rows_of(output), out, log)
    return out.movedim(-1, dim)
