"""Rows of logits with the token and the temperature of each row, and the arguments of their gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitRows(NamedTuple):
    """Rows of logits, the token that each row scores, and the temperature that divides its logits."""

    logits: Tensor  # [B, L, V] or [T, V]
    token_ids: Tensor  # [B, L] or [T]
    temperature: Tensor  # the same shape, float32


class RowGradients(NamedTuple):
    """The arguments of the gradient of the logits: results of the forward and incoming gradients, [B, L] or [T]."""

    shift: Tensor
    log_sum: Tensor  # log p_j = (logits_j - shift) / temperature - log_sum
    entropy: Tensor | None  # not read where grad_entropy is None
    grad_log_probs: Tensor
    grad_entropy: Tensor | None


class Epilogue(NamedTuple):
    """The step from u = hidden weight^T to the logits of a linear head: softcap * tanh((u + bias) / softcap)."""

    bias: Tensor | None = None  # [V] float32
    softcap: float = 0.0  # 0: none


NO_EPILOGUE = Epilogue()
