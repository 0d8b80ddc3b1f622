"""fused_linear_policy_loss on the CPU: per tile of rows, logits, loss and d logits in one sweep, and two matmuls."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import IGNORE_INDEX
from ..fused_policy_loss import cpu as fused_policy_loss
from ..linear_token_logprobs.cpu import Gradients, check_ids, counted_rows, gradient_in_place, logit_tiles


def forward_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    old_log_probs: Tensor | None,
    behaviour_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *objective,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """(log_probs, entropy, token_loss, token_grad, d hidden, d weight in float32, d bias in float32), rows flat.

    Rows of ignored ids are not computed; rows without a gradient are left out of its matmuls.
    """
    check_ids(token_ids, weight.shape[0])
    num_rows, entropy_coef = hidden.shape[0], objective[-1]
    per_token = (token_ids, temperature, old_log_probs, behaviour_log_probs, ref_log_probs, advantages, weights)
    index, hidden, *per_token = counted_rows(token_ids != IGNORE_INDEX, hidden, *per_token)
    results = torch.empty(4, hidden.shape[0])
    gradients = Gradients(hidden, weight, needs)
    for rows, tile in logit_tiles(hidden, weight, bias, softcap):
        grad_tile = gradient_in_place(tile, hidden.dtype)
        of_tile = [None if values is None else values[rows] for values in per_token]
        values = fused_policy_loss.forward_backward(tile, *of_tile, *objective, grad_tile, softcap)
        results[:, rows] = torch.stack(values)
        *_, token_grad = values
        counts = (token_grad != 0) | (entropy_coef * of_tile[-1] != 0)
        gradients.add(*_rows_that_count(rows, grad_tile, counts))
    outputs = [torch.zeros(num_rows) for _ in range(4)]
    for output, result in zip(outputs, results, strict=True):
        output[index] = result
    return *outputs, *gradients.results(index, num_rows)


def _rows_that_count(rows: slice, grad_tile: Tensor, counts: Tensor) -> tuple[slice | Tensor, Tensor]:
    """The same with the rows that count moved up to the front of the tile, so that no matmul sees the others."""
    if bool(counts.all()):
        return rows, grad_tile
    index = counts.nonzero().squeeze(-1)
    for to, source in enumerate(index.tolist()):
        if to != source:
            grad_tile[to].copy_(grad_tile[source])
    return rows.start + index, grad_tile[: len(index)]
