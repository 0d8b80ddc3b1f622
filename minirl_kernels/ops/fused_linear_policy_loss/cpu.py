"""fused_linear_policy_loss on the CPU: fused_policy_loss on each tile. Rows without a gradient take no matmul."""

from __future__ import annotations

from torch import Tensor

from ..fused_policy_loss import cpu as fused_policy_loss
from ..fused_policy_loss.loss_rows import LossRows
from ..linear_token_logprobs import cpu as head
from ..token_logprobs.rows import Epilogue, LogitRows

__all__ = ["head", "rows_with_gradient", "sweep_of_tile"]


def sweep_of_tile(rows: LogitRows, loss: LossRows, out: Tensor, epilogue: Epilogue) -> tuple[Tensor, ...]:
    return fused_policy_loss.forward_backward(rows, loss, out, epilogue.softcap)  # the logits include the bias


def rows_with_gradient(
    rows: slice, grad_tile: Tensor, token_grad: Tensor, entropy_grad: Tensor
) -> tuple[slice | Tensor, Tensor]:
    """(index of the rows with a gradient, their gradients), moved to the front of the tile for the matmuls."""
    has_gradient = (token_grad != 0) | (entropy_grad != 0)
    if bool(has_gradient.all()):
        return rows, grad_tile
    index = has_gradient.nonzero().squeeze(-1)
    for to, source in enumerate(index.tolist()):
        if to != source:
            grad_tile[to].copy_(grad_tile[source])
    return rows.start + index, grad_tile[: len(index)]
