"""The reference for the log-probability and entropy of a row of logits, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """(log_probs, entropy), both differentiable; x = logits / temperature, log p = x - logsumexp(x).

    logits [..., V]; token_ids and temperature [...]. Ignored tokens give 0 and no gradient, ids out of range NaN.
    """
    vocab_size = logits.shape[-1]
    ignored = token_ids == IGNORE_INDEX
    in_range = (token_ids >= 0) & (token_ids < vocab_size)
    # an ignored row may hold NaN, and its gradient must be 0 and not 0 * NaN
    logits, temperature = logits.masked_fill(ignored[..., None], 0.0), temperature.masked_fill(ignored, 1.0)
    log_p = torch.log_softmax(logits.to(temperature.dtype) / temperature[..., None], dim=-1)
    log_probs = log_p.gather(-1, token_ids.where(in_range, 0).long()[..., None]).squeeze(-1)
    # a logit of -inf has p = 0 and must add 0; p * log p would be 0 * -inf
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    invalid = ~in_range & ~ignored
    return tuple(values.masked_fill(ignored, 0.0).masked_fill(invalid, torch.nan) for values in (log_probs, entropy))
