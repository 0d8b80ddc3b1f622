"""token_logprobs on the CPU: allocate, call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ...common.checks import token_id_message


def forward(logits: Tensor, token_ids: Tensor, temperature: Tensor, with_entropy: bool) -> tuple[Tensor, ...]:
    """(log_probs, entropy or empty, shift, log_sum), each of token_ids' shape."""
    log_probs, shift, log_sum = (torch.empty(token_ids.shape) for _ in range(3))
    entropy = torch.empty(token_ids.shape if with_entropy else 0)
    bad_row = native().token_logprobs(
        *logits_arguments(logits),
        *ids_arguments(token_ids),
        temperature.data_ptr(),
        log_probs.data_ptr(),
        entropy.data_ptr() if with_entropy else 0,
        shift.data_ptr(),
        log_sum.data_ptr(),
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
    """d logits into `out`, which may be `logits` itself, or 16-bit memory that begins each row where logits' does."""
    native().token_logprobs_backward(
        *logits_arguments(logits),
        *ids_arguments(token_ids),
        temperature.data_ptr(),
        shift.data_ptr(),
        log_sum.data_ptr(),
        entropy.data_ptr() if grad_entropy is not None else 0,
        grad_log_probs.data_ptr(),
        grad_entropy.data_ptr() if grad_entropy is not None else 0,
        *output_arguments(out, softcap),
    )


def logits_arguments(logits: Tensor) -> tuple:
    """(pointer, dtype, rows [B, L], V, strides of B and L in elements)."""
    outer, vocab_size = logits.shape[:-1], logits.shape[-1]
    batch = outer[0] if len(outer) == 2 else 1
    batch_stride = logits.stride(0) if len(outer) == 2 else 0
    return logits.data_ptr(), str(logits.dtype), batch, outer[-1], vocab_size, batch_stride, logits.stride(-2)


def output_arguments(out: Tensor, softcap: float = 0.0) -> tuple:
    """(pointer, dtype, strides of B and L, softcap) of a gradient of the logits' shape.

    softcap: the gradient is by u where the logits are softcap * tanh(u / softcap); 0 where they are u themselves.
    """
    return out.data_ptr(), str(out.dtype), out.stride(0) if out.dim() == 3 else 0, out.stride(-2), softcap


def ids_arguments(token_ids: Tensor) -> tuple:
    return token_ids.data_ptr(), token_ids.dtype == torch.int64


def raise_bad_id(bad_row: int, token_ids: Tensor, logits: Tensor) -> None:
    """The kernels look at every id before they write anything, and return the first bad row, or -1."""
    if bad_row >= 0:
        raise ValueError(token_id_message(bad_row, token_ids, logits.shape[-1]))
