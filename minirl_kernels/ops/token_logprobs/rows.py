"""Rows of logits with the token and the temperature of each, and the numbers that their gradient is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitRows(NamedTuple):
    """Rows of logits, the token that each row scores, and the temperature that divides its logits."""

    logits: Tensor  # [B, L, V] or [T, V]
    token_ids: Tensor  # [B, L] or [T], as the tensors below
    temperature: Tensor  # float32


class RowGradients(NamedTuple):
    """What the gradient of the logits is made of beside the rows: numbers of the forward, and incoming gradients."""

    shift: Tensor
    log_sum: Tensor  # log p_j = (logits_j - shift) / temperature - log_sum
    entropy: Tensor | None  # not read where grad_entropy is None
    grad_log_probs: Tensor
    grad_entropy: Tensor | None


class Epilogue(NamedTuple):
    """What makes logits of u, the product of a linear head: softcap * tanh((u + bias) / softcap)."""

    bias: Tensor | None = None  # [V] float32
    softcap: float = 0.0  # 0: none


NO_EPILOGUE = Epilogue()
