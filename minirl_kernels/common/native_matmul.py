"""The native float32-accumulating matmul that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native

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
    copies = native().matmul(
        *matmul_arguments(out, a, b),
        len(out) if out.dim() == 3 else 1,
        0 if addend is None else addend.data_ptr(),
        () if addend is None else addend.stride(),
        alpha,
        beta,
        accumulate,
    )
    if copies:
        a, b = copied(copies, a, b)
        return matmul_into(out, a, b, accumulate=accumulate, addend=addend, alpha=alpha, beta=beta)
    return out


def matmul_arguments(out: Tensor, a: Tensor, b: Tensor) -> tuple:
    """What both native calls over matrices begin with."""
    return (
        out.data_ptr(),
        out.stride(),
        _NAMES[out.dtype],
        a.data_ptr(),
        a.shape,
        a.stride(),
        b.data_ptr(),
        b.shape,
        b.stride(),
        _NAMES[a.dtype],
        torch.get_num_threads(),
    )


def copied(copies: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Those of them contiguous that the native call asks for: no dimension of theirs is."""
    return a.contiguous() if copies & 1 else a, b.contiguous() if copies & 2 else b
