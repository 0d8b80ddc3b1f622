"""The native float32-accumulating matmul that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import native


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b. a [M, K], b [K, N], of one dtype, either way round; out [M, N] float32.

    The order of every output's sum is a function of K and the dtype alone, and out is never rounded to that dtype.
    """
    if 0 in out.shape:
        return out
    if a.shape[1] == 0:
        return out if accumulate else out.zero_()
    native().matmul(
        a.data_ptr(),
        *_strides(a),
        b.data_ptr(),
        *_strides(b),
        str(a.dtype),
        out.data_ptr(),
        out.stride(0),
        *out.shape,
        a.shape[1],
        accumulate,
        torch.get_num_threads(),
    )
    return out


def _strides(x: Tensor) -> tuple[int, int]:
    """(row, column); that of a dimension of one element is free, and the kernel wants one of the two to be 1."""
    rows, columns = x.shape
    return (1 if rows == 1 and x.stride(1) != 1 else x.stride(0)), (1 if columns == 1 else x.stride(1))
