"""The native float32-accumulating matmul that several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import native


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
    copies = native().matmul(out, a, b, addend, alpha, beta, accumulate, torch.get_num_threads())
    if copies:
        a, b = copied(copies, a, b)
        return matmul_into(out, a, b, accumulate=accumulate, addend=addend, alpha=alpha, beta=beta)
    return out


def copied(copies: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b, with a contiguous copy of each that the native call cannot read: bit 0 is a, bit 1 is b."""
    return a.contiguous() if copies & 1 else a, b.contiguous() if copies & 2 else b
