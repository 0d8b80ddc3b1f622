"""The chart of the README: time and peak memory of the losses, as one SVG for light pages and one for dark pages."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import matplotlib
from headlines import FROM_HIDDEN_STATES, FROM_LOGITS, LOG_PROBS, Work, without_entropy
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from records import machine, measured, median
from source import sources_in_words
from units import durations, memory

# element ids and text outlines must not differ from run to run or from machine to machine
SETTINGS = {"svg.hashsalt": "minirl-kernels", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10}


@dataclass(frozen=True)
class Theme:
    """The colors of text, of small text and axes, of our bars and of the other bars."""

    text: str
    faint: str
    ours: str
    theirs: str


THEMES = {
    "light": Theme(text="#1f2328", faint="#59636e", ours="#0969da", theirs="#b6bec8"),
    "dark": Theme(text="#e6edf3", faint="#9198a1", ours="#4493f8", theirs="#4d5661"),
}

# a work is a row of two panels; each of its contenders has a name for readers; our calls come first
PANELS: tuple[tuple[Work, dict[str, str]], ...] = (
    (
        FROM_LOGITS,
        {
            "fused_policy_loss(overwrite_logits=True)": "ours, in place",
            "fused_policy_loss": "ours",
            "torch.compile of it": "torch.compile",
            "TRL": "TRL",
            "eager torch": "eager PyTorch",
        },
    ),
    (
        FROM_HIDDEN_STATES,
        {
            "fused_linear_policy_loss": "ours",
            "CCE (torch_compile)": "Cut Cross-Entropy",
            "naive": "eager PyTorch",
            "Liger": "Liger",
            "TRL": "TRL",
        },
    ),
    (
        LOG_PROBS,
        {
            "token_logprobs": "ours",
            "F.cross_entropy": "F.cross_entropy",
            "torch.compile of it": "torch.compile",
            "TRL": "TRL",
            "eager torch": "eager PyTorch",
        },
    ),
)
QUANTITIES = ("time", "peak memory on top of the inputs")


@dataclass(frozen=True)
class Bars:
    """One panel: the time or the memory of a work, as a bar with its label for each contender."""

    work: Work
    names: list[str]
    are_ours: list[bool]
    lengths: list[float]
    labels: list[str]


def panels(results: dict[str, dict]) -> list[list[Bars]]:
    """For each work, its panel of time and its panel of memory."""
    return [_work_panels(work, work.case(results), names) for work, names in PANELS]


def _work_panels(work, case, names):
    entries = [measured(case, name) for name in names]
    times, peaks = [median(entry) for entry in entries], [entry["peak_bytes"] for entry in entries]
    ours = [entry["kind"] == "ours" for entry in entries]
    shown = list(names.values())
    return [
        Bars(work, shown, ours, times, durations(times)),
        Bars(work, shown, ours, [size or 0 for size in peaks], [memory(size) for size in peaks]),
    ]


def description(results: dict[str, dict]) -> str:
    """The chart in words. The SVG contains them as its description, which is_same compares."""
    lines = []
    for work_panels in panels(results):
        for quantity, bars in zip(QUANTITIES, work_panels, strict=True):
            values = ", ".join(f"{name} {label}" for name, label in zip(bars.names, bars.labels, strict=True))
            lines.append(f"{bars.work.name}, {quantity}: {values}.")
    return " ".join([*lines, *_caption(results)])


def _caption(results):
    works = [work for work, _ in PANELS]
    machines = dict.fromkeys(machine(results[work.result]) for work in works)
    cases = [work.case(results) for work in works]
    return [
        f"Medians on two threads of {', '.join(machines)}, bfloat16. Shorter is better.",
        without_entropy([name for _, names in PANELS for name in names]),
        sources_in_words([case["source"] for case in cases]),
    ]


def render(results: dict[str, dict], theme: str) -> str:
    """The chart as SVG text: the same text for the same results and the same version of matplotlib."""
    colors, rows = THEMES[theme], panels(results)
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 2 * len(rows) + 1.1))
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(rows), 2)
        for row, work_panels in zip(axes, rows, strict=True):
            for ax, bars in zip(row, work_panels, strict=True):
                _draw(ax, bars, colors)
            row[1].set_yticklabels([])
            work, place = work_panels[0].work, {"xycoords": "axes fraction"}
            row[0].annotate(work.name, (0, 1.2), color=colors.text, fontweight="bold", **place)
            row[0].annotate(work.sizes, (0, 1.06), color=colors.faint, fontsize=8.5, **place)
        figure.subplots_adjust(left=0.15, right=0.985, top=0.86, bottom=0.11, wspace=0.04, hspace=0.48)
        for ax, quantity in zip(axes[0], QUANTITIES, strict=True):
            ax.annotate(quantity, (0, 1.45), xycoords="axes fraction", color=colors.faint)
        figure.text(0.015, 0.018, "\n".join(_caption(results)), color=colors.faint, fontsize=8, linespacing=1.5)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata={"Date": None, "Description": description(results)}
        )
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _draw(ax, bars, colors):
    positions = range(len(bars.names))
    fills = [colors.ours if ours else colors.theirs for ours in bars.are_ours]
    ax.barh(positions, bars.lengths, color=fills, height=0.72)
    longest = max(bars.lengths)
    for position, length, label in zip(positions, bars.lengths, bars.labels, strict=True):
        ax.text(length + 0.012 * longest, position, label, va="center", color=colors.text, fontsize=9)
    ax.set_xlim(0, 1.22 * longest)  # room for the label of the longest bar
    ax.set_yticks(positions, bars.names, color=colors.text, fontsize=9)
    ax.invert_yaxis()
    ax.tick_params(left=False, bottom=False, labelbottom=False)
    ax.patch.set_alpha(0)
    for name, spine in ax.spines.items():
        spine.set_visible(name == "left")
        spine.set_color(colors.faint)


def is_same(old: str, new: str) -> bool:
    """Whether two charts are equal: as text, or by their descriptions if different releases of matplotlib drew them."""
    if _matplotlib(old) == _matplotlib(new):
        return old == new
    return _description(old) == _description(new)


def _matplotlib(svg):
    found = re.search(r"Matplotlib v([\d.]+)", svg)
    return found and found[1]


def _description(svg):
    found = re.search("<dc:description>(.*?)</dc:description>", svg, flags=re.DOTALL)
    return found and found[1]
