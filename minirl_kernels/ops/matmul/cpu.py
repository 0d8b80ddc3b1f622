"""Products of matrices on the CPU: call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.native_matmul import copied, matmul_into

__all__ = ["grouped_into", "matmul_into"]


def grouped_into(out: Tensor, a: Tensor, b: Tensor, ends: Tensor, grouped: str) -> None:
    """Product g is of the rows of a and out, of the columns of b and out, or of the terms, from ends[g - 1] to ends[g].

    grouped: "rows": a [M, K], b [G, K, N], out [M, N]; "columns": a [G, M, K], b [K, N], out [M, N]; "terms": a [M, K],
    b [K, N], out [G, M, N]. ends: [G] int32, contiguous. Otherwise as matmul_into; rows and columns of no group are 0.
    """
    copies, bad_group = native().matmul_grouped(out, a, b, grouped, ends, torch.get_num_threads())
    if copies:
        grouped_into(out, *copied(copies, a, b), ends, grouped)
    elif bad_group >= 0:
        size = {"rows": a.shape[-2], "columns": b.shape[-1], "terms": a.shape[-1]}[grouped]
        raise ValueError(
            f"offs has {ends[bad_group].item()} for group {bad_group}: it must be at least that of the group before, "
            f"and at most {size}, the number of {grouped}"
        )
