"""fused_policy_loss on the CPU: allocate, call the native kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...backends import native
from ..token_logprobs.cpu import raise_bad_id


class _Tokens(NamedTuple):
    """One float32 number for each token. The kernel reads the fields of these records by name."""

    old_log_probs: Tensor | None
    behaviour_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    advantages: Tensor
    weights: Tensor


class _Options(NamedTuple):
    objective: str
    clip: bool
    ratio_low: float
    ratio_high: float
    threshold: float
    kl_coef: float
    kl_estimator: str
    entropy_coef: float


class _Results(NamedTuple):
    log_probs: Tensor
    entropy: Tensor
    token_loss: Tensor
    token_grad: Tensor


def forward_backward(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    old_log_probs: Tensor | None,
    behaviour_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    objective: str,
    clip: bool,
    ratio_low: float,
    ratio_high: float,
    threshold: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    out: Tensor,
    softcap: float = 0.0,
    only_overflow: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, token_loss, token_grad); the gradient goes into `out`, which may be `logits` itself, or
    16-bit memory that begins each row where that of the float32 logits does.

    only_overflow: no gradient and no entropy; the others are 0 where no log-probability can make a loss overflow.
    """
    tokens = _Tokens(old_log_probs, behaviour_log_probs, ref_log_probs, advantages, weights)
    options = _Options(objective, clip, ratio_low, ratio_high, threshold, kl_coef, kl_estimator, entropy_coef)
    log_probs = torch.empty(token_ids.shape, dtype=torch.float32)
    results = _Results(log_probs, *(torch.empty_like(log_probs) for _ in range(3)))
    bad_row = native().fused_policy_loss(
        logits, token_ids, temperature, tokens, options, results, out, softcap, only_overflow
    )
    raise_bad_id(bad_row, token_ids, logits)
    return results
