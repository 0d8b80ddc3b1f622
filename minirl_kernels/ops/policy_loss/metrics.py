"""The metrics of a policy loss: entropy, discrepancy, staleness, clipping and truncation, from one set of sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...correction import Correction
from .correction import changed_tokens
from .inputs import PolicyLossInputs
from .layout import ordered_sum
from .metric_table import COUNTS, MAXIMA, METRICS, SUMS, Count, Observed, Sum
from .reference import token_ratios


@dataclass(frozen=True)
class PolicyLossMetrics:
    """Sums and maxima of the metrics, on the device. The host waits for the device only in `compute()`.

    `a + b` joins micro-batches, `all_reduce()` joins ranks, `compute()` gives names and numbers.

    sums: float64, one number per entry of COUNTS in metric_table.py, then one per entry of SUMS.
    maxima: float64, one number per entry of MAXIMA in metric_table.py.
    """

    sums: Tensor
    maxima: Tensor

    def __add__(self, other: PolicyLossMetrics) -> PolicyLossMetrics:
        return PolicyLossMetrics(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> PolicyLossMetrics:
        """The metrics over all ranks of `group`, the default group if None. It takes two collectives."""
        sums, maxima = self.sums.clone(), self.maxima.clone()
        torch.distributed.all_reduce(sums, torch.distributed.ReduceOp.SUM, group=group)
        torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX, group=group)
        return PolicyLossMetrics(sums, maxima)

    def compute(self) -> dict[str, float]:
        """The name and the number of each metric. Waits for the device.

        A metric is left out if no call had the tensor that it needs (rollout_log_probs, ref_log_probs or entropy).
        docs/metrics.md lists the names and their meaning.
        """
        sums = self.sums.tolist()
        counts = dict(zip(COUNTS, sums, strict=False))  # the sums begin with the counts
        totals = dict(zip(SUMS, sums[len(COUNTS) :], strict=True))
        maxima = dict(zip(MAXIMA, self.maxima.tolist(), strict=True))
        out = {}
        for metric in METRICS:
            if metric.always or counts[Count(metric.over, "token")]:
                values = [totals[Sum(metric.count, value)] for value in metric.sums]
                if metric.maximum is not None:
                    values.append(maxima[metric.maximum])
                out[metric.name] = metric.number(counts[metric.count], *values)
        return out


def collect_metrics(
    log_probs: Tensor, entropy: Tensor | None, overflows: Tensor, inputs: PolicyLossInputs
) -> PolicyLossMetrics:
    """The metrics of one call: float64 sums over the tokens of the mask, in an order that threads do not change.

    overflows: bool, True where a token's loss, or its derivative by the log-probability, is NaN.
    """
    mask, layout = inputs.mask, inputs.layout
    given = {
        "all": True,
        "entropy": entropy is not None,
        "ref": inputs.ref_log_probs is not None,
        "rollout": inputs.rollout_log_probs is not None,
    }
    no_token = torch.zeros_like(mask)
    known = {name: mask if is_given else no_token for name, is_given in given.items()}
    seen = _observed(log_probs, entropy, overflows, known, inputs)
    ones = torch.ones_like(mask, dtype=torch.float64)
    # for each sum over tokens: its values, and the tokens that it is over
    per_token = {count: (ones, known[count.over]) for count in COUNTS if count.per == "token"}
    per_token |= {entry: (entry.value(seen), known[entry.count.over]) for entry in SUMS if entry.count.per == "token"}
    table = torch.stack([torch.where(over, values.double(), 0.0) for values, over in per_token.values()])
    sums = dict(zip(per_token, ordered_sum(layout.response_sum(table)).unbind(), strict=True))
    for count in COUNTS:
        if count.per == "response":
            sums[count] = ones.new_full((), layout.num_responses if given[count.over] else 0)
    sums |= {entry: ordered_sum(entry.value(seen)) for entry in SUMS if entry.count.per == "response"}
    return PolicyLossMetrics(
        torch.stack([sums[key] for key in (*COUNTS, *SUMS)]), torch.stack([_maximum(value(seen)) for value in MAXIMA])
    )


def _observed(
    log_probs: Tensor,
    entropy: Tensor | None,
    overflows: Tensor,
    known: dict[str, Tensor],
    inputs: PolicyLossInputs,
) -> Observed:
    """The values that the metrics sum.

    known: for each choice of Count.over, the tokens of the mask, or no token if its tensor was not given.
    """
    zero, layout = log_probs.new_zeros(()), inputs.layout
    old = log_probs if inputs.old_log_probs is None else inputs.old_log_probs
    rollout = zero if inputs.rollout_log_probs is None else inputs.rollout_log_probs
    ref = zero if inputs.ref_log_probs is None else inputs.ref_log_probs

    def log_ratio(over, numerator, denominator):
        return torch.where(known[over], numerator.double() - denominator.double(), 0.0)

    log_w = log_ratio("rollout", log_probs, rollout)
    clip_high, clip_low, truncated = bounds_met(log_probs, inputs)
    return Observed(
        log_r=log_ratio("all", log_probs, old),
        log_d=log_ratio("rollout", old, rollout),
        log_k=log_ratio("ref", ref, log_probs),
        w=torch.where(known["rollout"], log_w.exp(), 0.0),
        entropy=zero if entropy is None else entropy,
        overflows=overflows,
        clip_high=clip_high,
        clip_low=clip_low,
        truncated=truncated,
        first_order_error=(layout.response_sum(log_w).expm1() - layout.response_sum(log_w.expm1())).abs(),
    )


def bounds_met(log_probs: Tensor, inputs: PolicyLossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(clip_high, clip_low, truncated) of Observed.

    clip_high, clip_low: where the upper or the lower bound on r changes the gradient.
    truncated: where rollout_is_threshold or a bound of a Correction changes the weight.
    """
    config, token = inputs.config, token_ratios(log_probs, inputs)
    clip_high, clip_low = config.policy_objective.bounds_met(token)
    truncated = (token.log_w if config.weighs_by_w else token.log_d).exp() > token.threshold
    if isinstance(config.rollout_is, Correction):
        old = log_probs if inputs.old_log_probs is None else inputs.old_log_probs
        truncated = truncated | changed_tokens(old, config.rollout_is, inputs)
    return clip_high, clip_low, truncated


def _maximum(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros((), dtype=torch.float64)
