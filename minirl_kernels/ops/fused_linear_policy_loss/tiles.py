"""fused_linear_policy_loss in tiles of rows, on any backend: logits, loss and d logits in one sweep, and two matmuls.

`kernels` is the module of a backend (cpu.py or triton.py). It has `head`, the module of linear_token_logprobs for the
same backend; sweep_of_tile, which is fused_policy_loss on the rows of a tile; and rows_with_gradient.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX
from ...common.records import at_rows
from ..fused_policy_loss.loss_rows import LossRows
from ..linear_token_logprobs.head import HeadRows, Needs
from ..linear_token_logprobs.tiles import Gradients, gradient_in_place, kept_at, logit_tiles


def forward_backward(kernels: ModuleType, head: HeadRows, loss: LossRows, needs: Needs) -> tuple[Tensor, ...]:
    """(log_probs, entropy, token_loss, token_grad, d hidden, d weight, d bias), with flat rows.

    d weight and d bias are float32. Rows of ignored ids are not computed. Rows that cannot have a gradient are left
    out of the matmuls of the gradients.
    """
    num_rows, vocab_size = head.hidden.shape[0], head.weight.shape[0]
    is_counted = head.token_ids != IGNORE_INDEX
    can_have_gradient = is_counted
    if loss.ref_log_probs is None and loss.entropy_coef == 0:
        # an id out of range must give a NaN gradient where the kernels do not raise
        out_of_range = (head.token_ids < 0) | (head.token_ids >= vocab_size)
        can_have_gradient = is_counted & ((loss.advantages != 0) | out_of_range)
    outputs = [torch.zeros_like(head.temperature) for _ in range(4)]
    index, num_with_gradient = rows_in_order(is_counted, can_have_gradient)
    head, kept, loss = head.at(index), kept_at(head, index), at_rows(loss, index)
    results = head.temperature.new_empty(4, head.hidden.shape[0])
    gradients = Gradients(kernels.head, head, needs)
    for rows, logit_rows in logit_tiles(kernels.head, head, kept):
        grad_tile = gradient_in_place(logit_rows.logits, head.hidden.dtype)
        loss_rows = at_rows(loss, rows)
        values = kernels.sweep_of_tile(logit_rows, loss_rows, grad_tile, head.epilogue)
        results[:, rows] = torch.stack(values)
        first = slice(rows.start, max(min(rows.stop, num_with_gradient), rows.start))
        count = first.stop - first.start
        entropy_grad = -loss.entropy_coef * loss_rows.weights[:count]
        gradients.add(*kernels.rows_with_gradient(first, grad_tile[:count], values[-1][:count], entropy_grad))
    for output, result in zip(outputs, results, strict=True):
        output[index] = result
    return *outputs, *gradients.results(index, num_rows)


def rows_in_order(is_counted: Tensor, can_have_gradient: Tensor) -> tuple[Tensor | slice, int]:
    """(index of the rows that count, rows that can have a gradient first; number of rows that can have a gradient).

    The host waits for the device here, for both numbers of rows, and nowhere else in a call.
    """
    num_with_gradient, num_rows = torch.stack([can_have_gradient.sum(), is_counted.sum()]).tolist()
    if num_with_gradient == len(is_counted):
        return slice(None), num_with_gradient
    order = torch.argsort(is_counted.to(torch.int8) + can_have_gradient, descending=True, stable=True)
    return order[:num_rows], num_with_gradient
