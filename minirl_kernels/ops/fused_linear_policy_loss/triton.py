"""fused_linear_policy_loss on the GPU: the vendor's matmul, and the Triton kernel of fused_policy_loss on each tile."""

from __future__ import annotations

from torch import Tensor

from ..fused_policy_loss.triton import forward_backward as sweep_of_tile
from ..linear_token_logprobs import triton as head

__all__ = ["head", "rows_with_gradient", "sweep_of_tile"]


def rows_with_gradient(
    rows: slice, grad_tile: Tensor, token_grad: Tensor, entropy_grad: Tensor
) -> tuple[slice, Tensor]:
    """All rows: only the device knows whose c_t is 0, for example by clipping. These rows add exact zeros."""
    return rows, grad_tile
