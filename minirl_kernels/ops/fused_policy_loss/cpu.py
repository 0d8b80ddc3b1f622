"""fused_policy_loss on the CPU: allocate, call the native kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from ..token_logprobs.cpu import ids_arguments, logits_arguments, output_arguments, raise_bad_id


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
    log_probs, entropy, token_loss, token_grad = (torch.empty(token_ids.shape) for _ in range(4))
    per_token = (old_log_probs, behaviour_log_probs, ref_log_probs, advantages, weights)
    bad_row = native().fused_policy_loss(
        *logits_arguments(logits),
        *ids_arguments(token_ids),
        temperature.data_ptr(),
        *(0 if values is None else values.data_ptr() for values in per_token),
        objective,
        clip,
        ratio_low,
        ratio_high,
        threshold,
        kl_coef,
        kl_estimator,
        entropy_coef,
        *(values.data_ptr() for values in (log_probs, entropy, token_loss, token_grad)),
        *output_arguments(out, softcap),
        only_overflow,
    )
    raise_bad_id(bad_row, token_ids, logits)
    return log_probs, entropy, token_loss, token_grad
