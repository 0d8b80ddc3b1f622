"""Prints the report as tables in a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from minirl_kernels import PolicyLossConfig
from minirl_kernels.discrepancy import DiscrepancyReport
from minirl_kernels.discrepancy.report import LOG_PROBS, FirstDifference, Jump


def show(report: DiscrepancyReport, console: Console, bounds: PolicyLossConfig) -> None:
    """Print the report. bounds: the config that was given to compare_engines."""
    metrics, threshold = report.metrics, bounds.rollout_is_threshold
    high, low = 1 + bounds.clip_ratio_high, 1 - bounds.clip_ratio_low
    quantiles = metrics["log_d_abs_quantiles"]
    rows = [
        ("KL(μ‖π_old), k1, k3", f"{number(metrics['discrepancy_kl_k1'])}, {number(metrics['discrepancy_kl_k3'])}"),
        ("  over the whole vocabulary, mean, max", f"{number(report.full_kl_mean)}, {number(report.full_kl_max)}"),
        ("max |Δ log p|", number(metrics["log_d_abs_max"])),
        (f"  quantiles {', '.join(quantiles)}", ", ".join(number(value) for value in quantiles.values())),
        ("tokens with the same bits", share(metrics["bit_equal_fraction"])),
    ]
    _print(console, f"Discrepancy d = π_old/μ, {int(metrics['num_tokens'])} sampled tokens (nats)", rows)
    rows = [
        ("KL(π_old‖π_θ), k1, k3", f"{number(metrics['staleness_kl_k1'])}, {number(metrics['staleness_kl_k3'])}"),
        ("max |log r|", number(metrics["log_r_abs_max"])),
        (
            f"masked if all advantages were positive, r > {high:g}",
            share(metrics["clip_fraction_high"]),
        ),
        (
            f"masked if all advantages were negative, r < {low:g}",
            share(metrics["clip_fraction_low"]),
        ),
    ]
    if report.has_update:
        _print(console, "Staleness r = π_θ/π_old", rows)
    rows = [
        ("mean, max", f"{number(metrics['is_weight_mean'])}, {number(metrics['is_weight_max'])}"),
        ("effective sample size, of 1", f"{metrics['ess']:.6f}"),
        ("truncated" if threshold is None else f"truncated, w > {threshold:g}", share(metrics["truncation_fraction"])),
        ("first-order error of a response, mean", number(metrics["first_order_error_mean"])),
    ]
    title = "Weight w = d r" if report.has_update else "Weight w = d (no updated model: r is 1, nothing is masked)"
    _print(console, title, rows)
    _show_layers(report, console)
    _show_first(report, console)


def number(value: float | None) -> str:
    """The value with three digits; "0" only for an exact zero."""
    return "none" if value is None else "0" if value == 0 else f"{value:.3g}"


def share(value: float) -> str:
    """The fraction in per cent; "0 %" and "100 %" only for exactly 0 and 1."""
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{min(max(100 * value, 0.001), 99.999):.3f} %"


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, min_width=72)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _show_layers(report: DiscrepancyReport, console: Console) -> None:
    routing = {layer.layer: layer for layer in report.routing or []}
    differences = {} if report.modules is None else dict(report.modules.layers)
    if report.modules is None:
        console.print(f"No modules were compared: {report.modules_missing}.")
    if report.routing is None:
        console.print(f"No routing was compared: {report.routing_missing}.")
    if not routing and not differences:
        return
    table = Table(title="Layer by layer", title_justify="left", title_style="bold", min_width=72)
    columns = ["layer"]
    columns += ["relative diff.", "tokens differing"] if differences else []
    columns += ["same experts", "overlap"] if routing else []
    for name in columns:
        table.add_column(name, justify="right")
    for layer in sorted({*routing, *differences}):
        row = [str(layer)]
        if differences:
            difference = differences.get(layer)
            row += (
                ["", ""] if difference is None else [number(difference.relative), share(difference.differing_fraction)]
            )
        if routing:
            agreement = routing.get(layer)
            row += ["", ""] if agreement is None else [share(agreement.equal_fraction), share(agreement.overlap)]
        table.add_row(*row)
    console.print(table)


def _show_first(report: DiscrepancyReport, console: Console) -> None:
    if report.modules is None:
        return
    count = report.modules.sequences
    traced = f"{count} sequence{'s' * (count != 1)}, {report.modules.tokens} tokens"
    first = report.modules.first
    if first is None:
        console.print(f"[bold]First difference:[/bold] none, in {traced}")
        return
    console.print(f"[bold]First difference:[/bold] {describe(first)}")
    console.print(
        f"  {share(first.difference.differing_fraction)} of the tokens, relative difference "
        f"{number(first.difference.relative)} ({traced})"
    )
    jump = report.modules.jump
    if jump is not None and jump.factor >= 2:  # rounding alone gives small factors in nearly every module
        console.print(
            f"  it grows most in {_where(jump)}: {number(jump.factor)} times, to {number(jump.difference.relative)}"
        )


def describe(first: FirstDifference) -> str:
    """The first difference in a few lines."""
    where = _where(first)
    operation = first.operation
    if operation is None:
        return f"{where}; {first.operation_missing}"
    mu, pi = ([name for name in ran if not _MAKES_NO_VALUES.search(name)] for ran in (operation.mu, operation.pi))
    if mu == pi and len(mu) == 1:
        return f"{where}, in {mu[0]}"
    if mu == pi:
        return f"{where}, in one of\n  {_listed(mu)}"
    return f"{where}, where\n  μ ran {_listed(mu)}\n  π ran {_listed(pi)}"


def _where(found: FirstDifference | Jump) -> str:
    where = found.module if found.module == LOG_PROBS else f"{found.module} ({found.kind})"
    if found.before is not None:
        where += f", before its {found.before.removeprefix(found.module + '.')}"
    return where


_MAKES_NO_VALUES = re.compile(
    r"^aten\.(_unsafe_view|alias|clone|detach|expand|permute|select|slice|split|squeeze|t|transpose|unsqueeze|view)\."
    r"| (bool|int32|int64)$"
)


def _listed(names: list[str], most: int = 12) -> str:
    """The names in order, without repetitions; at most `most` of them."""
    if not names:
        return "no operation that computes values"
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
