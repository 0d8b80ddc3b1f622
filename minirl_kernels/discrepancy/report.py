"""DiscrepancyReport: the result of a comparison, as values and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .modules import Difference, Event
from .operations import OperationDifference
from .routing import LayerAgreement

LOG_PROBS = "log_probs"  # stands for the head and the log-softmax, as if they were a module


@dataclass(frozen=True)
class FirstDifference:
    """The first module whose code produces different values in the two engines, and the operation in it."""

    module: str
    """Name of the module. "log_probs" means that the head or the log-softmax differs, and all modules before agree."""
    kind: str
    """Class of the module."""
    before: str | None
    """The submodule that receives the first differing input; None if the difference is in the module's output."""
    layer: int | None
    """Number of the module's decoder layer; None outside the decoder layers."""
    difference: Difference
    operation: OperationDifference | None
    operation_missing: str | None
    """The reason why `operation` is None."""


@dataclass(frozen=True)
class Jump:
    """The module whose code increases the difference most. Useful if roundings differ in every module."""

    module: str
    kind: str
    """Class of the module."""
    before: str | None
    """The submodule that receives the increased difference as input; None if it is in the module's output."""
    layer: int | None
    """Number of the module's decoder layer; None outside the decoder layers."""
    factor: float
    """Relative difference here, divided by the largest relative difference computed before."""
    difference: Difference


@dataclass(frozen=True)
class ModuleReport:
    """The comparison of modules on the traced sequences."""

    sequences: int
    tokens: int
    """Number of tokens that both engines computed. Tokens that mu read from a cache do not count."""
    first: FirstDifference | None
    """None if all compared values are equal."""
    jump: Jump | None
    """None if fewer than two places differ."""
    layers: list[tuple[int, Difference]]
    """(number, difference of the output) of each decoder layer."""
    modules: list[Event]
    """The outputs of all modules that could be compared, in the order of execution."""


@dataclass(frozen=True)
class DiscrepancyReport:
    """The differences between mu and pi. KL and log-ratios are in nats per token."""

    metrics: dict[str, Any]
    """`sampled_token_metrics` of the sampled tokens. Names of Eq. 5's ratios:
    d = pi_old / mu_old: discrepancy_*, log_d_*;
    r = pi_theta / pi_old: staleness_*, log_r_*, clip_fraction_*;
    w = d r: is_weight_*, ess, truncation_fraction, first_order_error_*."""
    has_update: bool
    """Whether pi_theta was given; otherwise pi_theta = pi_old and r = 1."""
    full_kl_mean: float | None
    """KL(mu || pi) over the whole vocabulary, mean over the positions; None if an engine gave no logits."""
    full_kl_max: float | None
    """The same, maximum over the positions."""
    routing: list[LayerAgreement] | None
    routing_missing: str | None
    """The reason why `routing` is None."""
    modules: ModuleReport | None
    modules_missing: str | None
    """The reason why `modules` is None."""
    log_d: Tensor = field(repr=False)
    """[tokens] float64: log pi_old - log mu_old."""

    @property
    def headline(self) -> dict[str, float]:
        """The numbers for which the command accepts a limit."""
        return {
            "kl_k3": self.metrics["discrepancy_kl_k3"],
            "kl_full": float("nan") if self.full_kl_mean is None else self.full_kl_mean,
            "abs_log_d_max": self.metrics["log_d_abs_max"],
        }

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings and lists, for JSON. Every report has every key."""
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
