"""The native matmul with float32 sums, which several ops share."""

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
    """out = a @ b, or out += a @ b if `accumulate`, or out = alpha (a @ b) + beta addend.

    out: [M, N], float32 or the dtype of a, last dimension contiguous; it shares no memory with the other tensors.
    a, b: [M, K] and [K, N] of one dtype; each may be a transposed view.
    addend: [M, N] with a contiguous last dimension, or [N]; of the dtype of a.
    accumulate: needs a float32 out and no addend.
    A batch dimension may come first in out, a, b and an addend [M, N].
    The order of each sum is a function of K and the dtype alone. A sum is rounded once, to the dtype of out.
    """
    copies = native().matmul(out, a, b, addend, alpha, beta, accumulate, torch.get_num_threads())
    if copies:
        a, b = copied(copies, a, b)
        return matmul_into(out, a, b, accumulate=accumulate, addend=addend, alpha=alpha, beta=beta)
    return out


def copied(copies: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), each copied to contiguous memory if its bit is set in `copies`: bit 0 for a, bit 1 for b."""
    return a.contiguous() if copies & 1 else a, b.contiguous() if copies & 2 else b
