"""The report as a PNG: the distribution of log d, the differences by layer, and the agreement of the routers."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minirl_kernels.discrepancy import DiscrepancyReport

from ..errors import MiniRLError
from ..plots import COLOURS
from ..run_dir import replacing
from .show import number

MOST_BINS = 61  # odd, so that one bin is centred at 0


def draw(report: DiscrepancyReport, path: Path, title: str) -> None:
    """Draw the report into `path`. Raises MiniRLError if path is not writable."""
    figure = Figure(figsize=(14, 4.4), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11)
    spread, growth, routing = figure.subplots(1, 3)
    _spread(spread, report)
    _growth(growth, report)
    _routing(routing, report)
    for axes in (spread, growth, routing):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary)
    except OSError as error:
        raise MiniRLError(f"{path} cannot be written to: {error.strerror}") from None


def _spread(axes: Axes, report: DiscrepancyReport) -> None:
    log_d = report.log_d[report.log_d.isfinite()].numpy()
    kl = number(report.metrics["discrepancy_kl_k3"])
    axes.set_title(rf"$\log d = \log \pi_{{old}} - \log \mu$ of sampled tokens, k3 = {kl}", fontsize=10, loc="left")
    axes.set_xlabel("nats", fontsize=9)
    axes.set_ylabel("tokens", fontsize=9)
    widest = float(abs(log_d).max()) if len(log_d) else 0.0
    if widest == 0:
        _annotate(axes, f"all {len(log_d)} tokens have the same bits" if len(log_d) else "no finite values")
        return
    bins = min(MOST_BINS, 2 * math.isqrt(len(log_d)) + 1)
    axes.hist(log_d, bins=bins, range=(-widest, widest), color=COLOURS[0])
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.ticklabel_format(axis="x", scilimits=(-2, 3))
    axes.xaxis.get_offset_text().set_fontsize(8)


def _growth(axes: Axes, report: DiscrepancyReport) -> None:
    axes.set_title("relative difference of each layer's output", fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel(r"$\|\mu - \pi\| \,/\, \|\pi\|$", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    layers = [] if report.modules is None else [(layer, d.relative) for layer, d in report.modules.layers]
    if not any(value for _, value in layers):
        _annotate(axes, "no layers were compared" if not layers else f"no difference in {len(layers)} layers")
        return
    floor = min(value for _, value in layers if value) / 10  # zeros are drawn here, since the axis is logarithmic
    axes.plot(*zip(*layers, strict=True), color=COLOURS[0], linewidth=1, alpha=0.4)
    differing = [(layer, value) for layer, value in layers if value]
    axes.plot(*zip(*differing, strict=True), "o", color=COLOURS[0], markersize=5)
    equal = [layer for layer, value in layers if not value]
    if equal:
        axes.plot(equal, [floor] * len(equal), "v", color=COLOURS[2], markersize=6, label="equal to the last bit")
        axes.legend(fontsize=8, frameon=False, loc="best")
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, 3 * max(value for _, value in layers))
    axes.set_xlim(layers[0][0] - 0.5, layers[-1][0] + 0.5)


def _routing(axes: Axes, report: DiscrepancyReport) -> None:
    axes.set_title("tokens that the routers send to other experts", fontsize=10, loc="left")
    axes.set_xlabel("layer", fontsize=9)
    axes.set_ylabel("% of tokens", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if report.routing is None:
        _annotate(axes, "no routing was compared")
        return
    layers = [layer.layer for layer in report.routing]
    other = [100 * (1 - layer.equal_fraction) for layer in report.routing]
    axes.bar(layers, other, width=0.7, color=COLOURS[1])
    axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    axes.set_ylim(bottom=0, top=None if any(other) else 1)
    if not any(other):
        _annotate(axes, "none")


def _annotate(axes: Axes, text: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color="#555555")
