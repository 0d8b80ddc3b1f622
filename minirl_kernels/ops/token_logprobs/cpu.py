"""token_logprobs on the CPU: allocate, call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.checks import token_id_message


def forward(logits: Tensor, token_ids: Tensor, temperature: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), each of token_ids' shape."""
    log_probs = torch.empty(token_ids.shape, dtype=torch.float32)
    shift, log_sum = torch.empty_like(log_probs), torch.empty_like(log_probs)
    entropy = torch.empty(token_ids.shape if with_entropy else 0, dtype=torch.float32)
    bad_row = native().token_logprobs(
        logits, token_ids, temperature, log_probs, entropy if with_entropy else None, shift, log_sum
    )
    raise_bad_id(bad_row, token_ids, logits)
    return log_probs, entropy, shift, log_sum


def backward(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
    out: Tensor,
    softcap: float = 0.0,
) -> None:
    """d logits into `out`, which may be `logits` itself, or 16-bit memory that begins each row where logits' does.

    softcap: the gradient is by u where the logits are softcap * tanh(u / softcap); 0 where they are u themselves.
    """
    entropy = None if grad_entropy is None else entropy
    native().token_logprobs_backward(
        logits, token_ids, temperature, shift, log_sum, entropy, grad_log_probs, grad_entropy, out, softcap
    )


def raise_bad_id(bad_row: int, token_ids: Tensor, logits: Tensor) -> None:
    """The kernels look at every id before they write anything, and return the first bad row, or -1."""
    if bad_row >= 0:
        raise ValueError(token_id_message(bad_row, token_ids, logits.shape[-1]))
