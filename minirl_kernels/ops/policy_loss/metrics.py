"""What a training run watches: entropy, discrepancy, staleness, masking and truncation, from one set of sums."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...correction import Correction
from .correction import changed_tokens
from .inputs import PolicyLossInputs
from .layout import ordered_sum
from .reference import token_ratios

_SUMS = (
    "tokens",
    "overflow_tokens",
    "responses",
    "staleness_k1",
    "staleness_k3",
    "clip_high",
    "clip_low",
    "truncated",
    "entropy_tokens",
    "entropy",
    "ref_tokens",
    "ref_kl",
    "rollout_tokens",
    "rollout_responses",
    "discrepancy_k1",
    "discrepancy_k3",
    "w",
    "w_squared",
    "first_order_error",
)
_MAXIMA = ("log_r", "log_d", "w", "first_order_error")


@dataclass(frozen=True)
class PolicyLossMetrics:
    """Mergeable sums and maxima, on the device; nothing waits for it until `compute()`.

    `a + b` joins micro-batches, `all_reduce()` joins ranks, `compute()` gives names and numbers.
    """

    sums: Tensor  # float64, one per name of _SUMS
    maxima: Tensor  # float64, one per name of _MAXIMA

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        return PolicyLossMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> PolicyLossMetrics:
        """The metrics over all ranks of `group` (two collectives)."""
        sums, maxima = self.sums.clone(), self.maxima.clone()
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.SUM, group=group)
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=group)
        return PolicyLossMetrics(sums, maxima)

    def compute(self) -> dict[str, float]:
        """Names and numbers; what a call could not know (no rollout, reference or entropy given) is left out.

        Over the tokens of the loss mask: `entropy` (nats); `discrepancy_kl_k1/k3` = KL(mu_old || pi_old) and
        `log_d_abs_max`, the training-inference discrepancy; `staleness_kl_k1/k3` = KL(pi_old || pi_theta) and
        `log_r_abs_max`, the staleness; `clip_fraction_high/low`, tokens whose gradient the bound on r stops (for
        CISPO, changes); `truncation_fraction`, weights above rollout_is_threshold, and tokens that the bounds of a
        Correction truncate or mask; `is_weight_mean/max` and `ess`, (sum w)^2 / (n sum w^2), of w = pi_theta / mu_old;
        `kl_ref`; `num_tokens`; `num_overflow_tokens`, those whose loss or c_t is NaN, as float32 does not hold it or an
        argument is not finite.
        Over the responses: `first_order_error_mean/max`, |prod w - 1 - sum (w - 1)|; `num_responses`.
        """
        s = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        m = dict(zip(_MAXIMA, self.maxima.tolist(), strict=True))
        out = {"num_tokens": s["tokens"], "num_responses": s["responses"]}
        if tokens := s["tokens"]:
            out |= {
                "num_overflow_tokens": s["overflow_tokens"],
                "staleness_kl_k1": s["staleness_k1"] / tokens,
                "staleness_kl_k3": s["staleness_k3"] / tokens,
                "log_r_abs_max": m["log_r"],
                "clip_fraction_high": s["clip_high"] / tokens,
                "clip_fraction_low": s["clip_low"] / tokens,
                "truncation_fraction": s["truncated"] / tokens,
            }
        if tokens := s["entropy_tokens"]:
            out["entropy"] = s["entropy"] / tokens
        if tokens := s["ref_tokens"]:
            out["kl_ref"] = s["ref_kl"] / tokens
        if tokens := s["rollout_tokens"]:
            out |= {
                "discrepancy_kl_k1": s["discrepancy_k1"] / tokens,
                "discrepancy_kl_k3": s["discrepancy_k3"] / tokens,
                "log_d_abs_max": m["log_d"],
                "is_weight_mean": s["w"] / tokens,
                "is_weight_max": m["w"],
                "ess": s["w"] ** 2 / (tokens * s["w_squared"]) if s["w_squared"] else math.nan,
                "first_order_error_mean": s["first_order_error"] / s["rollout_responses"],
                "first_order_error_max": m["first_order_error"],
            }
        return out


def collect_metrics(
    log_probs: Tensor, entropy: Tensor | None, overflows: Tensor, inputs: PolicyLossInputs
) -> PolicyLossMetrics:
    """Sums over the tokens of the mask, in float64 and response by response, so that threads do not change them.

    overflows: bool, where a token's loss or c_t is NaN.
    """
    mask, layout = inputs.mask, inputs.layout
    none = torch.zeros_like(mask)

    def known(values):  # -> (values, or zeros; where they are known)
        return (log_probs.new_zeros(()), none) if values is None else (values, mask)

    entropy, with_entropy = known(entropy)
    ref, with_ref = known(inputs.ref_log_probs)
    rollout, with_rollout = known(inputs.rollout_log_probs)
    old = log_probs if inputs.old_log_probs is None else inputs.old_log_probs

    def log_ratio(over, above, below):
        return torch.where(over, above.double() - below.double(), 0.0)

    log_r, log_d = log_ratio(mask, log_probs, old), log_ratio(with_rollout, old, rollout)
    log_w, log_k = log_ratio(with_rollout, log_probs, rollout), log_ratio(with_ref, ref, log_probs)
    w = torch.where(with_rollout, log_w.exp(), 0.0)
    clip_high, clip_low, truncated = _bounds_met(log_probs, inputs)
    ones = torch.ones_like(log_r)
    # the sums of one token each, with the tokens they are taken over
    per_token = {
        "tokens": (ones, mask),
        "overflow_tokens": (overflows, mask),
        "staleness_k1": (-log_r, mask),
        "staleness_k3": (log_r.expm1() - log_r, mask),
        "clip_high": (clip_high, mask),
        "clip_low": (clip_low, mask),
        "truncated": (truncated, mask),
        "entropy_tokens": (ones, with_entropy),
        "entropy": (entropy, with_entropy),
        "ref_tokens": (ones, with_ref),
        "ref_kl": (log_k.expm1() - log_k, with_ref),
        "rollout_tokens": (ones, with_rollout),
        "discrepancy_k1": (-log_d, with_rollout),
        "discrepancy_k3": (log_d.expm1() - log_d, with_rollout),
        "w": (w, with_rollout),
        "w_squared": (w.square(), with_rollout),
    }
    table = torch.stack([torch.where(over, values.double(), 0.0) for values, over in per_token.values()])
    sums = dict(zip(per_token, ordered_sum(layout.response_sum(table)).unbind(), strict=True))
    # |prod w - 1 - sum (w - 1)|, one per response
    first_order_error = (layout.response_sum(log_w).expm1() - layout.response_sum(log_w.expm1())).abs()
    sums["first_order_error"] = ordered_sum(first_order_error)
    sums["responses"] = ones.new_full((), layout.num_responses)
    sums["rollout_responses"] = ones.new_full((), layout.num_responses * (inputs.rollout_log_probs is not None))
    maxima = {"log_r": log_r.abs(), "log_d": log_d.abs(), "w": w, "first_order_error": first_order_error}
    return PolicyLossMetrics(
        torch.stack([sums[name] for name in _SUMS]), torch.stack([_maximum(maxima[name]) for name in _MAXIMA])
    )


def _bounds_met(log_probs: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Where the objective's upper and lower bound change the gradient, and where the bounds of the weight do."""
    config, token = inputs.config, token_ratios(log_probs, inputs)
    above, below = config.policy_objective.bounds_met(token)
    truncated = (token.log_w if config.weighs_by_w else token.log_d).exp() > token.threshold
    if isinstance(config.rollout_is, Correction):
        old = log_probs if inputs.old_log_probs is None else inputs.old_log_probs
        truncated = truncated | changed_tokens(old, config.rollout_is, inputs)
    return above, below, truncated


def _maximum(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros((), dtype=torch.float64)
