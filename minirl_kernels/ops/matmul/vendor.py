"""A matmul with a float32 result by the GPU vendor's library, called through torch.

The vendor's library chooses its order of summation by the number of rows, so batch-invariant mode uses the Triton
kernel instead. On the CPU, for Triton's interpreter, torch multiplies in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.invariance import is_batch_invariant
from . import triton


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b if `accumulate`.

    out: [M, N] float32.
    a, b: [M, K] and [K, N] of one dtype; each may be a transposed view.
    Sums are float32, and never rounded to the dtype of a and b. Float32 operands follow torch's setting of TF32.
    """
    if 0 in out.shape:
        return out
    if is_batch_invariant():
        return triton.matmul_into(out, a, b, addend=out if accumulate else None)
    options: dict[str, Any] = {"out_dtype": torch.float32}
    if a.device.type == "cpu":  # torch takes no out_dtype on the CPU
        a, b, options = a.float(), b.float(), {}
    return torch.addmm(out, a, b, beta=float(accumulate), out=out, **options)
