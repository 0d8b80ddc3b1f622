"""token_logprobs on the CPU: allocate, call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.checks import token_id_message
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
    """The gradient of the logits into `out`.

    out: may be the logits themselves, or 16-bit memory that begins each row where that of the logits does.
    softcap: the gradient is by u where the logits are softcap * tanh(u / softcap); 0 where they are u themselves.
    """
    if gradients.grad_entropy is None:
        gradients = gradients._replace(entropy=None)
    native().token_logprobs_backward(*rows, *gradients, out, softcap)


def raise_bad_id(bad_row: int, rows: LogitRows) -> None:
    """The kernels look at every id before they write anything, and return the first bad row, or -1."""
    if bad_row >= 0:
        raise ValueError(token_id_message(bad_row, rows.token_ids, rows.logits.shape[-1]))
