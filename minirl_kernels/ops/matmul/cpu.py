"""CPU backend of matmul: calls the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.native_matmul import copied, matmul_into

__all__ = ["grouped_into", "matmul_into"]


def grouped_into(out: Tensor, a: Tensor, b: Tensor, ends: Tensor, grouped: str) -> None:
    """Write one matrix product per group into out. Group g goes from ends[g - 1] to ends[g]; the first starts at 0.

    out, a, b: as in matmul_into, but for the shapes below. Rows and columns of out that are in no group are 0.
    ends: [G] int32, contiguous.
    grouped: "rows" of a and out: a [M, K], b [G, K, N], out [M, N];
        "columns" of b and out: a [G, M, K], b [K, N], out [M, N];
        "terms" of the sums: a [M, K], b [K, N], out [G, M, N].
    Raises ValueError if ends falls, or goes beyond the number of rows, columns or terms.
    """
    copies, bad_group = native().matmul_grouped(out, a, b, grouped, ends, torch.get_num_threads())
    if copies:
        grouped_into(out, *copied(copies, a, b), ends, grouped)
    elif bad_group >= 0:
        size = {"rows": a.shape[-2], "columns": b.shape[-1], "terms": a.shape[-1]}[grouped]
        raise ValueError(
            f"offs has {ends[bad_group].item()} for group {bad_group}: it must be 0 or more, never fall, and be "
            f"at most {size}, the number of {grouped}"
        )
