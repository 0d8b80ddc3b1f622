"""What a comparison found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .modules import Difference, Event
from .operations import OperationDifference
from .routing import LayerAgreement

LOG_PROBS = "log_probs"  # what is made of the last hidden states, as a module of its own


@dataclass(frozen=True)
class FirstDifference:
    """The module whose own code is the first to give the engines other values, and the operation in it."""

    module: str
    """Its name, or "log_probs": all modules up to the head agree, and the head or the log-softmax does not."""
    kind: str
    """Its class."""
    before: str | None
    """The submodule that it first hands a differing input to; none where the difference is in its output."""
    layer: int | None
    """The decoder layer that it is in; none outside them."""
    difference: Difference
    operation: OperationDifference | None
    operation_missing: str | None
    """Why there is no operation."""


@dataclass(frozen=True)
class Jump:
    """The module whose own code makes the difference grow most: where roundings differ everywhere, look here."""

    module: str
    kind: str
    """Its class."""
    before: str | None
    """The submodule that it hands the grown difference to; none where that is in its output."""
    layer: int | None
    """The decoder layer that it is in; none outside them."""
    factor: float
    """How many times it is the largest relative difference of all that was computed before."""
    difference: Difference


@dataclass(frozen=True)
class ModuleReport:
    """Of the sequences that were traced."""

    sequences: int
    tokens: int
    """Those that both computed: what mu read from a cache is left out."""
    first: FirstDifference | None
    jump: Jump | None
    """None where no two places differ."""
    layers: list[tuple[int, Difference]]
    """The outputs of the decoder layers, by number."""
    modules: list[Event]
    """The outputs of all modules that could be compared, in the order of execution."""


@dataclass(frozen=True)
class DiscrepancyReport:
    """How far mu and pi are apart. Everything is nats per token unless it says otherwise."""

    metrics: dict[str, Any]
    """Over the sampled tokens, of `sampled_token_metrics`. Eq. 5's d = pi_old / mu_old is in discrepancy_* and log_d_*;
    r = pi_theta / pi_old in staleness_*, log_r_* and clip_fraction_*; w = d r in is_weight_*, ess, truncation_fraction
    and first_order_error_*."""
    has_update: bool
    """Whether there was a pi_theta; if not, it is pi_old, and r is 1."""
    full_kl_mean: float | None
    """KL(mu || pi) over the whole vocabulary, the mean over the positions; none where an engine gave no logits."""
    full_kl_max: float | None
    routing: list[LayerAgreement] | None
    routing_missing: str | None
    """Why there is no routing."""
    modules: ModuleReport | None
    modules_missing: str | None
    log_d: Tensor = field(repr=False)
    """[tokens] float64: log pi_old - log mu_old."""

    @property
    def headline(self) -> dict[str, float]:
        """The numbers that a limit may be set for."""
        return {
            "kl_k3": self.metrics["discrepancy_kl_k3"],
            "kl_full": float("nan") if self.full_kl_mean is None else self.full_kl_mean,
            "abs_log_d_max": self.metrics["log_d_abs_max"],
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, names and lists, for JSON; every key is there in every report."""
        metrics = dict(self.metrics)
        staleness = {key: metrics.pop(key) for key in ("staleness_kl_k1", "staleness_kl_k3", "log_r_abs_max")}
        return {
            "num_tokens": int(metrics.pop("num_tokens")),
            "num_responses": int(metrics.pop("num_responses")),
            "discrepancy": {
                "kl_k1": metrics.pop("discrepancy_kl_k1"),
                "kl_k3": metrics.pop("discrepancy_kl_k3"),
                "kl_full_mean": self.full_kl_mean,
                "kl_full_max": self.full_kl_max,
                "abs_log_d_max": metrics.pop("log_d_abs_max"),
                "abs_log_d_quantiles": metrics.pop("log_d_abs_quantiles"),
                "bit_equal_fraction": metrics.pop("bit_equal_fraction"),
            },
            "staleness": {
                "kl_k1": staleness["staleness_kl_k1"],
                "kl_k3": staleness["staleness_kl_k3"],
                "abs_log_r_max": staleness["log_r_abs_max"],
            }
            if self.has_update
            else None,
            "importance_weight": metrics,
            "routing": None if self.routing is None else [_agreement(layer) for layer in self.routing],
            "routing_missing": self.routing_missing,
            "modules": None if self.modules is None else _modules(self.modules),
            "modules_missing": self.modules_missing,
        }


def _modules(report: ModuleReport) -> dict[str, Any]:
    first = report.first
    operation = None if first is None else first.operation
    return {
        "sequences": report.sequences,
        "tokens": report.tokens,
        "first_difference": None
        if first is None
        else {
            "module": first.module,
            "class": first.kind,
            "layer": first.layer,
            "before": first.before,
            **_numbers(first.difference),
            "operation": None
            if operation is None
            else {
                "name": operation.name,
                "relative_difference": None if operation.difference is None else operation.difference.relative,
                "ran_mu": operation.mu,
                "ran_pi": operation.pi,
            },
            "operation_missing": first.operation_missing,
        },
        "jump": None
        if report.jump is None
        else {
            "module": report.jump.module,
            "class": report.jump.kind,
            "layer": report.jump.layer,
            "before": report.jump.before,
            "factor": report.jump.factor,
            **_numbers(report.jump.difference),
        },
        "layers": [{"layer": number, **_numbers(difference)} for number, difference in report.layers],
        "outputs": [
            {"module": event.module, "class": event.kind, **_numbers(event.difference)} for event in report.modules
        ],
    }


def _agreement(layer: LayerAgreement) -> dict[str, Any]:
    return {"router": layer.router, "equal_fraction": layer.equal_fraction, "overlap": layer.overlap}


def _numbers(difference: Difference) -> dict[str, float]:
    return {
        "differing_fraction": difference.differing_fraction,
        "relative_difference": difference.relative,
        "max_abs_difference": difference.max_abs,
    }
