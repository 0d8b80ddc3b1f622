"""fused_linear_policy_loss in tiles of rows, on any backend: logits, loss and d logits in one sweep, and two matmuls.

`kernels` is the module of a backend (cpu.py or triton.py). It has `head`, the module of linear_token_logprobs for the
same backend; choose_rows and spread, which take the rows that count out of all rows and bring their results back;
sweep_of_tile, which is fused_policy_loss on the rows of a tile; and rows_with_gradient.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...common.records import at_rows
from ..fused_policy_loss.loss_rows import LossRows
from ..linear_token_logprobs.head import HeadRows, Needs
from ..linear_token_logprobs.tiles import Gradients, gradient_in_place, kept_at, logit_tiles


class ChosenRows(NamedTuple):
    """The rows that count, those that can have a gradient first: their place among all rows, and their arguments."""

    index: Tensor | slice  # a slice of all rows, or the row of each
    num_with_gradient: int
    head: HeadRows
    loss: LossRows
    place: Tensor | None = None  # of each of all rows among the chosen ones, or -1; for `spread` of a backend


def forward_backward(
    kernels: ModuleType, head: HeadRows, loss: LossRows, needs: Needs, max_rows: int | None
) -> tuple[Tensor, ...]:
    """(log_probs, entropy, token_loss, token_grad, d hidden, d weight, d bias), with flat rows.

    d weight and d bias are float32. Rows of ignored ids are not computed. Rows that cannot have a gradient are left
    out of the matmuls of the gradients.
    max_rows: at most so many rows count; None: the host waits for their number.
    """
    num_rows = head.hidden.shape[0]
    chosen = kernels.choose_rows(head, loss, max_rows)
    kept, index = kept_at(head, chosen.index), chosen.index
    head, loss = chosen.head, chosen.loss
    results: list[tuple[Tensor, ...]] = []
    gradients = Gradients(kernels.head, head, needs, index, num_rows)
    for rows, logit_rows in logit_tiles(kernels.head, head, kept):
        grad_tile = gradient_in_place(logit_rows.logits, head.hidden.dtype)
        loss_rows = at_rows(loss, rows)
        values = kernels.sweep_of_tile(logit_rows, loss_rows, grad_tile, head.epilogue)
        results.append(values)
        first = slice(rows.start, max(min(rows.stop, chosen.num_with_gradient), rows.start))
        count = first.stop - first.start
        gradients.add(*kernels.rows_with_gradient(first, grad_tile[:count], values[-1][:count], loss_rows))
    if not results:  # no row counts
        results.append(tuple(torch.empty_like(head.temperature) for _ in range(4)))
    per_row = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*results, strict=True)]
    return *kernels.spread(per_row, chosen, num_rows), *gradients.results()


def all_rows(head: HeadRows, loss: LossRows) -> ChosenRows:
    """All rows, and also the ignored ones, as rows that can have a gradient. The kernels skip ignored rows."""
    return ChosenRows(slice(None), head.hidden.shape[0], head, loss)


def gives_every_row_a_gradient(loss: LossRows) -> bool:
    """Whether a KL or an entropy term gives a gradient to rows with an advantage of 0."""
    return loss.ref_log_probs is not None or loss.entropy_coef != 0
