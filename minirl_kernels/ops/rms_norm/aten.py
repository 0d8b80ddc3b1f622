"""The fused rms_norm of aten, computed by the kernels of a backend, below autograd and with the arguments of aten.

Only GPUs have this operation: on a CPU, torch composes rms_norm from other operations, which are replaced too. A
function returns NotImplemented for a call that the kernels do not compute: several normalised dimensions, a weight of
another dtype than x, or eps=None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

from torch import Tensor


def operations(kernels: ModuleType) -> dict[str, Callable]:
    """{overload: function that computes its result}"""
    return {
        "_fused_rms_norm": partial(rms_norm, kernels),
        "_fused_rms_norm_backward": partial(rms_norm_backward, kernels),
    }


def rms_norm(kernels, x: Tensor, normalized_shape, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    if len(normalized_shape) != 1 or eps is None or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    if not x.dim() or x.shape[-1] != normalized_shape[0] or (weight is not None and weight.shape != x.shape[-1:]):
        return NotImplemented
    return kernels.forward(x, weight, eps)


def rms_norm_backward(
    kernels, grad: Tensor, x: Tensor, normalized_shape, rstd: Tensor, weight: Tensor | None, mask
) -> tuple[Tensor, Tensor]:
    if len(normalized_shape) != 1 or grad.dtype != x.dtype or (weight is not None and weight.dtype != x.dtype):
        return NotImplemented
    return kernels.backward(grad, x, weight, rstd, *mask)
