"""fused_linear_policy_loss on the CPU: fused_policy_loss on each tile. Rows without a gradient take no matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX
from ...common.records import at_rows
from ..fused_policy_loss import cpu as fused_policy_loss
from ..fused_policy_loss.loss_rows import LossRows
from ..linear_token_logprobs import cpu as head
from ..linear_token_logprobs.head import HeadRows
from ..token_logprobs.rows import Epilogue, LogitRows
from .tiles import ChosenRows, all_rows, gives_every_row_a_gradient

__all__ = ["choose_rows", "head", "rows_with_gradient", "spread", "sweep_of_tile"]


def sweep_of_tile(rows: LogitRows, loss: LossRows, out: Tensor, epilogue: Epilogue) -> tuple[Tensor, ...]:
    return fused_policy_loss.forward_backward(rows, loss, out, epilogue.softcap)  # the logits include the bias


def choose_rows(head: HeadRows, loss: LossRows, max_rows: int | None) -> ChosenRows:
    """The rows that count. max_rows is not used, since the CPU reads their number without a wait."""
    can_have_gradient = is_counted = head.token_ids != IGNORE_INDEX
    if not gives_every_row_a_gradient(loss):
        can_have_gradient = is_counted & (loss.advantages != 0)
    num_with_gradient, num_rows = torch.stack([can_have_gradient.sum(), is_counted.sum()]).tolist()
    if num_with_gradient == len(is_counted):
        return all_rows(head, loss)
    order = torch.argsort(is_counted.to(torch.int8) + can_have_gradient, descending=True, stable=True)
    index = order[:num_rows]
    return ChosenRows(index, num_with_gradient, head.at(index), at_rows(loss, index))


def spread(results: list[Tensor], chosen: ChosenRows, num_rows: int) -> list[Tensor]:
    """Results of the chosen rows as results of all rows, 0 where a row was not chosen."""
    if isinstance(chosen.index, slice):
        return results
    outputs = [result.new_zeros(num_rows) for result in results]
    for output, result in zip(outputs, results, strict=True):
        output[chosen.index] = result
    return outputs


def rows_with_gradient(
    rows: slice, grad_tile: Tensor, token_grad: Tensor, loss: LossRows
) -> tuple[slice | Tensor, Tensor]:
    """(index of the rows with a gradient, their gradients), moved to the front of the tile for the matmuls."""
    entropy_grad = -loss.entropy_coef * loss.weights[: len(token_grad)]
    has_gradient = (token_grad != 0) | (entropy_grad != 0)
    if bool(has_gradient.all()):
        return rows, grad_tile
    index = has_gradient.nonzero().squeeze(-1)
    for to, source in enumerate(index.tolist()):
        if to != source:
            grad_tile[to].copy_(grad_tile[source])
    return rows.start + index, grad_tile[: len(index)]
