"""token_logprobs on the CPU: allocate the results and call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.checks import token_id_message
from ...common.records import with_values
from .rows import LogitRows, RowGradients


def forward(rows: LogitRows, with_entropy: bool) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), each of token_ids' shape."""
    shape = rows.token_ids.shape
    log_probs = torch.empty(shape, dtype=torch.float32)
    shift, log_sum = torch.empty_like(log_probs), torch.empty_like(log_probs)
    entropy = torch.empty(shape if with_entropy else 0, dtype=torch.float32)
    bad_row = native().token_logprobs(*rows, log_probs, entropy if with_entropy else None, shift, log_sum)
    raise_bad_id(bad_row, rows)
    return log_probs, entropy, shift, log_sum


def backward(rows: LogitRows, gradients: RowGradients, out: Tensor, softcap: float = 0.0) -> None:
    """Write the gradient into `out`.

    out: may be the logits, or 16-bit memory in which each row begins at the address of its row of logits.
    softcap: the logits are softcap * tanh(u / softcap), and the gradient is by u. 0 means that the logits are u.
    """
    if gradients.grad_entropy is None:
        gradients = with_values(gradients, entropy=None)
    native().token_logprobs_backward(*rows, *gradients, out, softcap)


def raise_bad_id(bad_row: int, rows: LogitRows) -> None:
    """Raise ValueError unless bad_row is -1. The kernels check all ids before they write, and return this number."""
    if bad_row >= 0:
        raise ValueError(token_id_message(bad_row, rows.token_ids, rows.logits.shape[-1]))
