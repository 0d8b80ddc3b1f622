"""The curves of one run, or of several in one picture, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .errors import MiniRLError
from .metrics import read_metrics
from .run_dir import RunDir, replacing


@dataclass(frozen=True)
class Panel:
    """One small diagram: metrics that share an axis, each with the name that its legend gives it."""

    title: str
    curves: dict[str, str]
    top: float | None = None


PANELS = (
    Panel("mean reward", {"reward_train": "training", "reward_held_out": "held-out"}, top=1.0),
    Panel("token entropy, nats", {"entropy": ""}),
    Panel("gradient norm before clipping", {"grad_norm": ""}),
    Panel(r"staleness, KL$(\pi_{old}\,\|\,\pi_\theta)$", {"staleness_kl_k3": ""}),
    Panel(r"training-inference discrepancy, KL$(\mu_{old}\,\|\,\pi_{old})$", {"discrepancy_kl_k3": ""}),
    Panel(
        "share of tokens",
        {"clip_fraction_high": "masked above", "clip_fraction_low": "masked below", "truncation_fraction": "truncated"},
    ),
)
COLOURS = ("#1f5fa8", "#d1661a", "#2b8a57", "#a33b8f", "#6b6b6b", "#b59a00", "#c23b3b", "#2aa6b8")
LINE_STYLES = ("-", "--", ":")


def plot_runs(run_dirs: Sequence[RunDir], path: Path) -> None:
    """Draw the training curves of the runs into a PNG. Raises MiniRLError if one has none, or path is unwritable."""
    runs = {str(run_dir.path): read_metrics(run_dir.metrics, "train") for run_dir in run_dirs}
    for name, lines in runs.items():
        if not lines:
            raise MiniRLError(f"{name} has no training steps to plot yet")
    figure = Figure(figsize=(13, 6.8), dpi=130, layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, panel in zip(grid.flat, PANELS, strict=True):
        _draw(axes, panel, runs)
    for axes in grid[-1]:
        axes.set_xlabel("global step", fontsize=8)
    if len(runs) > 1:
        handles = [Line2D([], [], color=COLOURS[number % len(COLOURS)]) for number in range(len(runs))]
        figure.legend(handles, runs, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
    else:
        figure.suptitle(next(iter(runs)), fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            figure.savefig(temporary)
    except OSError as error:
        raise MiniRLError(f"{path} cannot be written to: {error.strerror}") from None


def _draw(axes: Axes, panel: Panel, runs: dict[str, list[dict[str, Any]]]) -> None:
    """One panel. Colours tell curves apart in a picture of one run, and runs in a picture of several."""
    several = len(runs) > 1
    for number, lines in enumerate(runs.values()):
        for curve, metric in enumerate(panel.curves):
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            steps, values = [step for step, _ in points], [value for _, value in points]
            look = {"color": COLOURS[(number if several else curve) % len(COLOURS)], "linewidth": 1.6}
            look["linestyle"] = LINE_STYLES[curve] if several else "-"
            if metric == "reward_held_out":
                axes.plot(steps, values, marker="o", markersize=4, **look)
            else:
                axes.plot(steps, values, color=look["color"], linewidth=0.7, alpha=0.35)
                axes.plot(steps, trailing_mean(values), **look)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0, top=panel.top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    if len(panel.curves) > 1:
        count = len(panel.curves)
        styles = [("black", LINE_STYLES[curve]) if several else (COLOURS[curve], "-") for curve in range(count)]
        handles = [Line2D([], [], color=colour, linestyle=style) for colour, style in styles]
        axes.legend(handles, panel.curves.values(), fontsize=8, frameon=False)


def trailing_mean(values: Sequence[float], width: int = 10) -> list[float]:
    """The mean of each value and those before it, `width` in all."""
    windows = (values[max(0, end - width) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
