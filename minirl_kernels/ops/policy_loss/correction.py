"""The weights of a `Correction`, token by token, from log d = log(pi_old / mu_old)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...correction import Correction
from .inputs import PolicyLossInputs
from .layout import ordered_sum


def log_correction(log_d: Tensor, correction: Correction, inputs: PolicyLossInputs) -> Tensor:
    """Log of the weight that replaces d, per token; -inf where the correction masks the token.

    log_d: float64, log d of each token, 0 where the loss mask is 0.
    """
    log_d = _at_level(log_d, correction, inputs)
    lower, upper = _log_bounds(correction)
    if not correction.masks:
        log_weight = log_d.clamp(lower, upper)
    else:
        log_weight = log_d if correction.weighs else torch.zeros_like(log_d)
        log_weight = log_weight.masked_fill(_beyond(log_d, correction, inputs), -math.inf)
    if correction.normalise:
        log_weight = log_weight - _mean(log_weight.exp(), correction, inputs).log()
    return log_weight


def changed_tokens(old_log_probs: Tensor, correction: Correction, inputs: PolicyLossInputs) -> Tensor:
    """Bool tensor, True for the tokens that the bounds of the correction truncate or mask."""
    log_d = torch.where(inputs.mask, old_log_probs.double() - inputs.rollout_log_probs, 0.0)
    return _beyond(_at_level(log_d, correction, inputs), correction, inputs)


def _at_level(log_d: Tensor, correction: Correction, inputs: PolicyLossInputs) -> Tensor:
    if correction.level == "token":
        return log_d
    log_d = inputs.layout.to_tokens(inputs.layout.response_sum(log_d))
    return log_d / inputs.lengths if correction.level == "sequence_mean" else log_d


def _log_bounds(correction: Correction) -> tuple[float, float]:
    lower = -math.inf if correction.lower is None else math.log(correction.lower)
    return lower, math.inf if correction.upper is None else math.log(correction.upper)


def _beyond(log_d: Tensor, correction: Correction, inputs: PolicyLossInputs) -> Tensor:
    lower, upper = _log_bounds(correction)
    beyond = ((log_d < lower) | (log_d > upper)) & inputs.mask
    if correction.beyond == "mask_response":
        beyond = inputs.layout.to_tokens(inputs.layout.response_sum(beyond.double())) > 0
    return beyond


def _mean(weight: Tensor, correction: Correction, inputs: PolicyLossInputs) -> Tensor:
    """The mean weight of the unmasked tokens, or of their responses if level is not "token"; 1 if all are masked."""
    share = (inputs.mask & (weight != 0)).double()
    if correction.level != "token":
        share = share / inputs.lengths
    terms = torch.stack([torch.where(share > 0, share * weight, 0.0), share])
    total, count = ordered_sum(inputs.layout.response_sum(terms)).unbind()
    return torch.where(count > 0, total / count, 1.0)
