"""The native float32-accumulating matmul that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import native

# str(dtype) takes longer than a small product
_NAMES = {dtype: str(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def matmul_into(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    accumulate: bool = False,
    addend: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """out = a @ b, or out += a @ b, or out = alpha (a @ b) + beta addend.

    a [M, K] and b [K, N], of one dtype, either way round; out [M, N], float32 or of that dtype, last dimension
    contiguous; addend of the dtype of a: [M, N], last dimension contiguous, or [N]. Or all but an addend [N] with one
    more dimension in front. accumulate: into float32, without an addend. None of them shares memory with out.
    The order of every output's sum is a function of K and the dtype alone; it is rounded once, to the dtype of out.
    """
    a, a_strides = matrix_strides(a)
    b, b_strides = matrix_strides(b)
    addend_address = addend_batch = addend_row = 0
    if addend is not None:
        addend_address = addend.data_ptr()
        *_, addend_batch, addend_row, _ = (0, 0, *addend.stride())
    native().matmul(
        *matmul_arguments(out, a, a_strides, b, b_strides),
        out.shape[0] if out.dim() == 3 else 1,
        addend_address,
        addend_batch,
        addend_row,
        alpha,
        beta,
        accumulate,
    )
    return out


def matmul_arguments(out: Tensor, a: Tensor, a_strides, b: Tensor, b_strides) -> tuple:
    """What both native calls over matrices begin with."""
    out_strides = out.stride()
    return (
        out.data_ptr(),
        out_strides[0] if len(out_strides) == 3 else 0,
        out_strides[-2],
        _NAMES[out.dtype],
        a.data_ptr(),
        *a_strides,
        b.data_ptr(),
        *b_strides,
        _NAMES[a.dtype],
        a.shape[-2],
        b.shape[-1],
        a.shape[-1],
        torch.get_num_threads(),
    )


def matrix_strides(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(x, its strides of batch, row and column), one of the last two 1: x is a copy where neither is.

    That of a dimension of one element is free, and so are all where there is none.
    """
    strides, (rows, columns) = x.stride(), x.shape[-2:]
    row, column = strides[-2], 1 if columns == 1 else strides[-1]
    if column != 1 and row != 1:
        if rows == 1 or not x.numel():
            row = 1
        else:
            return matrix_strides(x.contiguous())
    return x, (strides[0] if len(strides) == 3 else 0, row, column)
