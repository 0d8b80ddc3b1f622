"""fused_linear_policy_loss in tiles of rows, on any backend: logits, loss and d logits in one sweep, and two matmuls.

`kernels` is a backend's module (cpu.py, triton.py), which gives `head`, that of linear_token_logprobs; sweep_of_tile,
which is fused_policy_loss on the rows of a tile; and rows_with_gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX
from ..kept_logits.op import KeptRows
from ..linear_token_logprobs.tiles import Gradients, at_rows, gradient_in_place, logit_tiles


def forward_backward(
    kernels: ModuleType,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
    old_log_probs: Tensor | None,
    behaviour_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *objective,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """(log_probs, entropy, token_loss, token_grad, d hidden, d weight in float32, d bias in float32), rows flat.

    Rows of ignored ids are not computed; rows that cannot have a gradient are left out of its matmuls.
    """
    num_rows, vocab_size, entropy_coef = hidden.shape[0], weight.shape[0], objective[-1]
    counts = token_ids != IGNORE_INDEX
    can_have_gradient = counts
    if ref_log_probs is None and entropy_coef == 0:
        # the gradient of an id out of range is no number where the kernels do not raise
        can_have_gradient = counts & ((advantages != 0) | (token_ids < 0) | (token_ids >= vocab_size))
    index, num_with_gradient = rows_in_order(counts, can_have_gradient)
    per_token = (token_ids, temperature, old_log_probs, behaviour_log_probs, ref_log_probs, advantages, weights)
    kept = KeptRows.of(kept_ids, kept_offsets)
    hidden, kept, *per_token = at_rows(index, hidden, kept, *per_token)
    results = temperature.new_empty(4, hidden.shape[0])
    gradients = Gradients(kernels.head, hidden, weight, needs)
    for rows, tile in logit_tiles(kernels.head, hidden, weight, bias, softcap, kept):
        grad_tile = gradient_in_place(tile, hidden.dtype)
        of_tile = at_rows(rows, *per_token)
        values = kernels.sweep_of_tile(tile, *of_tile, *objective, grad_tile, bias, softcap)
        results[:, rows] = torch.stack(values)
        first = slice(rows.start, max(min(rows.stop, num_with_gradient), rows.start))
        count = first.stop - first.start
        entropy_grad = -entropy_coef * of_tile[-1][:count]
        gradients.add(*kernels.rows_with_gradient(first, grad_tile[:count], values[-1][:count], entropy_grad))
    outputs = [torch.zeros_like(temperature) for _ in range(4)]
    for output, result in zip(outputs, results, strict=True):
        output[index] = result
    return *outputs, *gradients.results(index, num_rows)


def rows_in_order(counts: Tensor, can_have_gradient: Tensor) -> tuple[Tensor | slice, int]:
    """(index of the rows that count, those that can have a gradient first; how many these are).

    Both numbers of rows are what the host waits for, the one time in a call.
    """
    num_with_gradient, num_rows = torch.stack([can_have_gradient.sum(), counts.sum()]).tolist()
    if num_with_gradient == len(counts):
        return slice(None), num_with_gradient
    order = torch.argsort(counts.to(torch.int8) + can_have_gradient, descending=True, stable=True)
    return order[:num_rows], num_with_gradient
