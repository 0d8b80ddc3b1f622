"""The picture of a run shows every value: any reward, spikes, exact zeros, a single step."""

import json
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from minirl.errors import MiniRLError
from minirl.plots import COLOURS, PANELS, draw_runs, plot_runs
from minirl.run_dir import RunDir

DISCREPANCY = "discrepancy_kl_k3"


def lines(count: int, **metrics) -> list[dict]:
    """Lines for steps 0 to count, where step 0 is an evaluation. A metric is a function of the step."""
    return [{"step": 0, "reward_held_out": 0.0}] + [
        {"step": step, **{name: value(step) for name, value in metrics.items()}} for step in range(1, count + 1)
    ]


def panel_of(figure, metric: str):
    """The axes that show a metric."""
    (place,) = [number for number, panel in enumerate(PANELS) if metric in panel.curves]
    return figure.axes[place]


def shown(axes) -> list[float]:
    """The values of all curves that are inside the limits of the axes."""
    low, high = axes.get_ylim()
    values = [value for line in axes.lines if line.get_transform() == axes.transData for value in line.get_ydata()]
    return [value for value in values if low <= value <= high]


def notes(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("rewards", [(-1.0, 1.0), (-20.0, -10.0), (0.0, 5.0), (100.0, 101.0), (0.2, 0.8), (0.0, 0.0)])
def test_rewards_of_any_range_are_shown(rewards):
    low, high = rewards
    figure = draw_runs({"run": lines(20, reward_train=lambda step: low + (high - low) * step / 20)})
    axes = panel_of(figure, "reward_train")
    assert {low + (high - low) / 20, high} <= set(shown(axes))
    if (low, high) == (0.2, 0.8):  # the axis shows 0 to 1 for rewards in this range
        assert axes.get_ylim() == pytest.approx((-0.03, 1.03))


def test_a_spike_does_not_squash_the_discrepancy():
    figure = draw_runs({"run": lines(50, discrepancy_kl_k3=lambda step: 30.0 if step == 25 else 1e-4 * (1 + step % 2))})
    axes = panel_of(figure, DISCREPANCY)
    figure.draw_without_rendering()
    heights = axes.transAxes.inverted().transform(axes.transData.transform([[1, 1e-4], [1, 2e-4], [1, 30.0]]))[:, 1]
    assert heights[1] - heights[0] > 0.03
    assert 0 < heights[0] < heights[2] < 1
    bold = axes.lines[-1].get_ydata()
    assert max(bold) == 2e-4  # the median is below the spike


def test_a_discrepancy_of_exactly_zero_is_visible():
    always = panel_of(draw_runs({"run": lines(30, discrepancy_kl_k3=lambda step: 0.0)}), DISCREPANCY)
    assert notes(always) == ["exactly 0 in every step"]
    assert [len(line.get_xdata()) for line in always.lines if line.get_marker() == "|"] == [30]
    sometimes = panel_of(draw_runs({"run": lines(30, discrepancy_kl_k3=lambda step: step % 2 * 1e-5)}), DISCREPANCY)
    assert notes(sometimes) == ["| exactly 0"]
    (marks,) = [line for line in sometimes.lines if line.get_marker() == "|"]
    assert list(marks.get_xdata()) == list(range(2, 31, 2))
    assert notes(panel_of(draw_runs({"run": lines(30, discrepancy_kl_k3=lambda step: 1e-5)}), DISCREPANCY)) == []


def test_response_length_and_cut_off_share_have_panels():
    figure = draw_runs({"run": lines(20, response_length=lambda step: 10.0 * step, cut_off_fraction=lambda step: 0.25)})
    axes = panel_of(figure, "response_length")
    assert axes.get_title(loc="left") == "response length, tokens"
    assert 200.0 in shown(axes)
    assert 0.25 in shown(panel_of(figure, "cut_off_fraction"))
    legend = panel_of(figure, "cut_off_fraction").get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["responses cut off", "prompts with a signal"]


def test_one_step_is_a_visible_point():
    figure = draw_runs({"run": lines(1, entropy=lambda step: 1.5)})
    assert [line.get_marker() for line in panel_of(figure, "entropy").lines][-1] == "o"


def test_metrics_that_are_missing_or_not_finite_in_some_steps():
    def entropy(step):
        return math.nan if step % 3 == 0 else 1.0 * step

    run = lines(10, entropy=entropy)
    del run[5]["entropy"]
    figure = draw_runs({"run": run})
    assert list(panel_of(figure, "entropy").lines[0].get_xdata()) == [1, 2, 4, 7, 8, 10]
    assert all(math.isfinite(value) for line in panel_of(figure, "entropy").lines for value in line.get_ydata())
    assert notes(panel_of(figure, "grad_norm")) == ["no values"]


def test_runs_of_one_picture_have_colours_of_their_own():
    runs = {f"run {number}": lines(5, entropy=lambda step, number=number: number) for number in range(12)}
    axes = panel_of(draw_runs(runs), "entropy")
    assert len({tuple(to_rgb(line.get_color())) for line in axes.lines}) == 12
    assert len(draw_runs(runs).legends[0].get_texts()) == 12


def test_the_file_has_the_curve_on_a_light_background(tmp_path):
    run_dir = RunDir(tmp_path)
    records = [{"phase": "train", **line} for line in lines(20, reward_train=lambda step: -0.5)]
    run_dir.metrics.write_text("\n".join(map(json.dumps, records)))
    plot_runs([run_dir], tmp_path / "curves.png")
    picture = matplotlib.image.imread(tmp_path / "curves.png")[..., :3]
    assert np.median(picture) == 1.0
    first = picture[: picture.shape[0] // 2, : picture.shape[1] // 4]
    assert (np.abs(first - to_rgb(COLOURS[0])).max(-1) < 0.02).any(0).sum() > 100  # pixels of a line below 0


def test_a_run_without_steps_is_told(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.metrics.write_text("")
    with pytest.raises(MiniRLError, match="has no training steps to plot yet"):
        plot_runs([run_dir], tmp_path / "curves.png")
