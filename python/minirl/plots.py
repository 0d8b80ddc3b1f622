"""The curves of one run, or of several in one picture, as PNG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .errors import MiniRLError
from .metrics import read_metrics
from .run_dir import RunDir, replacing


@dataclass(frozen=True)
class Panel:
    """One small diagram of metrics that share an axis. curves: {metric: name in the legend}.

    log: the axis is logarithmic, so that a spike does not hide small values; exact zeros are marked at its bottom.
    unit_interval: the axis shows 0 to 1, or the range of the values if one is outside.
    """

    title: str
    curves: dict[str, str]
    log: bool = False
    unit_interval: bool = False


PANELS = (
    Panel("mean reward", {"reward_train": "training", "reward_held_out": "held-out"}, unit_interval=True),
    Panel("response length, tokens", {"response_length": ""}),
    Panel(
        "share of responses and of prompts",
        {"cut_off_fraction": "responses cut off", "groups_with_signal": "prompts with a signal"},
        unit_interval=True,
    ),
    Panel("token entropy, nats", {"entropy": ""}),
    Panel("gradient norm before clipping", {"grad_norm": ""}, log=True),
    Panel(r"staleness, KL$(\pi_{old}\,\|\,\pi_\theta)$, nats", {"staleness_kl_k3": ""}, log=True),
    Panel(r"discrepancy, KL$(\mu_{old}\,\|\,\pi_{old})$, nats", {"discrepancy_kl_k3": ""}, log=True),
    Panel(
        "share of tokens",
        {"clip_fraction_high": "masked above", "clip_fraction_low": "masked below", "truncation_fraction": "truncated"},
    ),
)
COLOURS = ("#1f5fa8", "#d1661a", "#2b8a57", "#a33b8f", "#6b6b6b", "#b59a00", "#c23b3b", "#2aa6b8")
LINE_STYLES = ("-", "--", ":")
WINDOW = 10  # steps
FEW = 10  # a curve of up to this many points gets markers, since a line of one point is invisible


def plot_runs(run_dirs: Sequence[RunDir], path: Path) -> None:
    """Draw the training curves of the runs into a picture. Raises MiniRLError for a run without steps, or if path is
    not writable."""
    runs = {str(run_dir.path): read_metrics(run_dir.metrics, "train") for run_dir in run_dirs}
    for name, lines in runs.items():
        if not lines:
            raise MiniRLError(f"{name} has no training steps to plot yet")
    figure = draw_runs(runs)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary)
    except OSError as error:
        raise MiniRLError(f"{path} cannot be written to: {error.strerror}") from None


def draw_runs(runs: dict[str, list[dict[str, Any]]]) -> Figure:
    """The figure of several runs. runs: {name: lines of metrics.jsonl of the phase "train"}."""
    figure = Figure(figsize=(15, 6.8), dpi=120, layout="constrained")
    colours = COLOURS if len(runs) <= len(COLOURS) else colormaps["turbo"].resampled(len(runs))(range(len(runs)))
    for axes, panel in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        _draw(axes, panel, runs, colours)
    figure.supxlabel(
        f"global step      (faint: each step; bold: the mean of the last {WINDOW}, on logarithmic axes their median)",
        fontsize=9,
    )
    if len(runs) > 1:
        handles = [Line2D([], [], color=colours[number]) for number in range(len(runs))]
        figure.legend(handles, runs, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    else:
        figure.suptitle(next(iter(runs)), fontsize=11)
    return figure


def _draw(axes: Axes, panel: Panel, runs: dict[str, list[dict[str, Any]]], colours: Sequence) -> None:
    """Draw one panel. Colours distinguish curves in a picture of one run, and runs in a picture of several."""
    several = len(runs) > 1
    if panel.log:
        axes.set_yscale("log")
    drawn, last_step = [], 1
    for number, lines in enumerate(runs.values()):
        for curve, metric in enumerate(panel.curves):
            steps, values = points(lines, metric)
            colour = colours[number if several else curve]
            _draw_curve(axes, steps, values, colour, LINE_STYLES[curve] if several else "-", metric)
            drawn += values
            last_step = max([last_step, *steps])
    _scale(axes, panel, drawn)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlim(0, last_step * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8)
    if len(panel.curves) > 1:
        count = len(panel.curves)
        styles = [("black", LINE_STYLES[curve]) if several else (colours[curve], "-") for curve in range(count)]
        handles = [Line2D([], [], color=colour, linestyle=style) for colour, style in styles]
        axes.legend(handles, panel.curves.values(), fontsize=8, frameon=False)


def points(lines: Sequence[dict[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it was logged and is finite."""
    found = [(line["step"], line[metric]) for line in lines if isinstance(line.get(metric), (int, float))]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return [step for step, _ in found], [value for _, value in found]


def _draw_curve(axes: Axes, steps: list[int], values: list[float], colour: Any, style: str, metric: str) -> None:
    """Draw the values (faint) and their trailing mean or median. An evaluation metric is drawn by its values alone."""
    look = {"color": colour, "linestyle": style, "linewidth": 1.6, "markersize": 4}
    if metric == "reward_held_out":
        axes.plot(steps, values, marker="o", **look)
        return
    average = fmean
    if axes.get_yscale() == "log":
        average = median  # the mean would show one spike for WINDOW steps
        _mark_zeros(axes, [step for step, value in zip(steps, values, strict=True) if value <= 0], colour)
        positive = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
        steps, values = [step for step, _ in positive], [value for _, value in positive]
    axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(steps, trailing(average, values), marker="o" if len(steps) <= FEW else "", **look)


def _mark_zeros(axes: Axes, steps: list[int], colour: Any) -> None:
    """Mark steps whose value is 0 at the bottom of a logarithmic axis, which cannot show 0."""
    look = {"color": colour, "linestyle": "", "marker": "|", "markersize": 7}
    axes.plot(steps, [0.02] * len(steps), transform=axes.get_xaxis_transform(), **look)


def _scale(axes: Axes, panel: Panel, values: list[float]) -> None:
    """Set the range of the y axis. Add a note if there are no values, or zeros on a logarithmic axis."""
    note = None if values else "no values"
    if panel.log and values and min(values) <= 0:
        note = "| exactly 0" if max(values) > 0 else "exactly 0 in every step"
    if note is not None:
        axes.text(0.5, 0.06, note, transform=axes.transAxes, ha="center", fontsize=9, color="#444444")
    if panel.log:
        if not any(value > 0 for value in values):
            axes.set_yticks([])
            axes.minorticks_off()
        return
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_fontsize(8)
    if not panel.unit_interval:
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    elif all(0 <= value <= 1 for value in values):
        axes.set_ylim(-0.03, 1.03)


def trailing(function: Callable[[Sequence[float]], float], values: Sequence[float]) -> list[float]:
    """For each value, the function of it and the values before it, `WINDOW` values in all."""
    return [function(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]
