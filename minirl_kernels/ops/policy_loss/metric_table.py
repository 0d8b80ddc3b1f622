"""The table of the metrics of a policy loss: name, meaning, sums, and the function from the sums to the number.

A new metric is one entry of METRICS, one line of docs/metrics.md, and the rows of its count, sums and maximum in
kernels_metrics.py. Tests compare the three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """The values that the metrics sum, per token, [B, L] or [T]; the log-ratios are float64.

    A value is 0 where a token is masked, and everywhere if the call was not given the tensor that it needs.
    """

    log_r: Tensor  # log pi_theta / pi_old
    log_d: Tensor  # log pi_old / mu_old
    log_k: Tensor  # log pi_ref / pi_theta
    w: Tensor  # pi_theta / mu_old
    entropy: Tensor  # nats
    overflows: Tensor  # bool, like the next three
    clip_high: Tensor
    clip_low: Tensor
    truncated: Tensor
    first_order_error: Tensor  # [B], float64


Value = Callable[[Observed], Tensor]


class Count(NamedTuple):
    """The tokens or responses that a metric is over. It is also the key of their number among the sums."""

    over: Literal["all", "entropy", "ref", "rollout"]
    per: Literal["token", "response"]


class Sum(NamedTuple):
    """The sum of a value over the tokens or responses of `count`."""

    count: Count
    value: Value


@dataclass(frozen=True)
class Metric:
    """A metric: its number is number(count, *sums) or number(count, maximum).

    over: "all" counts all tokens or responses. "entropy", "ref" and "rollout" count only in calls that were given
        entropy, ref_log_probs or rollout_log_probs.
    always: keep the metric if no token counts. Otherwise it is left out.
    """

    name: str
    doc: str
    number: Callable[..., float]
    sums: tuple[Value, ...] = ()
    maximum: Value | None = None
    over: Literal["all", "entropy", "ref", "rollout"] = "all"
    per: Literal["token", "response"] = "token"
    always: bool = False

    @property
    def count(self) -> Count:
        return Count(self.over, self.per)


def _mean(name: str, value: Value, doc: str, **options) -> Metric:
    return Metric(name, doc, lambda count, total: total / count, sums=(value,), **options)


def _maximum(name: str, value: Value, doc: str, **options) -> Metric:
    return Metric(name, doc, lambda count, largest: largest, maximum=value, **options)


def _k3(log_ratio: Tensor) -> Tensor:
    return log_ratio.expm1() - log_ratio


def _w(seen: Observed) -> Tensor:
    return seen.w


def _first_order_error(seen: Observed) -> Tensor:
    return seen.first_order_error


def _effective_share(count: float, w: float, w_squared: float) -> float:
    return w**2 / (count * w_squared) if w_squared else math.nan


METRICS = (
    Metric("num_tokens", "tokens of the loss mask", lambda count: count, always=True),
    Metric("num_responses", "responses", lambda count: count, per="response", always=True),
    Metric(
        "num_overflow_tokens",
        "tokens whose loss or c_t is NaN: float32 does not hold it, or an argument is not finite",
        lambda count, total: total,
        sums=(lambda seen: seen.overflows,),
    ),
    _mean("staleness_kl_k1", lambda seen: -seen.log_r, "KL(pi_old, pi_theta), nats, by k1: mean of -log r"),
    _mean("staleness_kl_k3", lambda seen: _k3(seen.log_r), "KL(pi_old, pi_theta), nats, by k3: mean of r - 1 - log r"),
    _maximum("log_r_abs_max", lambda seen: seen.log_r.abs(), "maximum of abs(log r)"),
    _mean(
        "clip_fraction_high",
        lambda seen: seen.clip_high,
        "share of tokens whose gradient the upper bound on r stops (for CISPO, changes)",
    ),
    _mean(
        "clip_fraction_low",
        lambda seen: seen.clip_low,
        "share of tokens whose gradient the lower bound on r stops (for CISPO, changes)",
    ),
    _mean(
        "truncation_fraction",
        lambda seen: seen.truncated,
        "share of tokens that rollout_is_threshold or the bounds of a Correction truncate or mask",
    ),
    _mean("entropy", lambda seen: seen.entropy, "mean of H[pi_theta] at the tokens, nats", over="entropy"),
    _mean("kl_ref", lambda seen: _k3(seen.log_k), "KL(pi_theta, pi_ref), nats, by k3", over="ref"),
    _mean(
        "discrepancy_kl_k1",
        lambda seen: -seen.log_d,
        "KL(mu_old, pi_old), nats, the training-inference discrepancy, by k1: mean of -log d",
        over="rollout",
    ),
    _mean(
        "discrepancy_kl_k3",
        lambda seen: _k3(seen.log_d),
        "KL(mu_old, pi_old), nats, by k3: mean of d - 1 - log d",
        over="rollout",
    ),
    _maximum("log_d_abs_max", lambda seen: seen.log_d.abs(), "maximum of abs(log d)", over="rollout"),
    _mean("is_weight_mean", _w, "mean of w = pi_theta / mu_old", over="rollout"),
    _maximum("is_weight_max", _w, "maximum of w", over="rollout"),
    Metric(
        "ess",
        "effective sample size as a share of the tokens: (sum of w)^2 / (n sum of w^2)",
        _effective_share,
        sums=(_w, lambda seen: seen.w.square()),
        over="rollout",
    ),
    _mean(
        "first_order_error_mean",
        _first_order_error,
        "mean over responses of abs(product of w - 1 - sum of (w - 1)), which the first-order approximation neglects",
        over="rollout",
        per="response",
    ),
    _maximum(
        "first_order_error_max",
        _first_order_error,
        "maximum of the same number over responses",
        over="rollout",
        per="response",
    ),
)
# the order of the numbers in PolicyLossMetrics.sums (COUNTS, then SUMS) and in PolicyLossMetrics.maxima
COUNTS = tuple(dict.fromkeys(metric.count for metric in METRICS))
SUMS = tuple(dict.fromkeys(Sum(metric.count, value) for metric in METRICS for value in metric.sums))
MAXIMA = tuple(dict.fromkeys(metric.maximum for metric in METRICS if metric.maximum is not None))
