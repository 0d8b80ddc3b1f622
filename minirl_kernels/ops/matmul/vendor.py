"""The GPU vendor's matmul, float32 out of three dtypes; on the CPU, for Triton's interpreter, what stands for it.

In batch-invariant mode it is our own: the vendor's picks its way of summing by the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.invariance import is_batch_invariant
from . import triton


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b. a [M, K], b [K, N], of one dtype, either way round; out [M, N] float32.

    Summed in float32 and never rounded to the dtype of a and b; float32 operands follow torch's own setting of TF32.
    """
    if 0 in out.shape:
        return out
    if is_batch_invariant():
        return triton.matmul_into(out, a, b, addend=out if accumulate else None)
    options: dict[str, Any] = {"out_dtype": torch.float32}
    if a.device.type == "cpu":  # torch has no out_dtype there
        a, b, options = a.float(), b.float(), {}
    return torch.addmm(out, a, b, beta=float(accumulate), out=out, **options)
