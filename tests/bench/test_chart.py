"""The chart shows the figures of the results. It is the same in every run, and is valid for other matplotlibs."""

import chart
import matplotlib
import pytest
import report
from records import load


@pytest.fixture(scope="module")
def results():
    return load(report.ROOT / report.RESULTS)


@pytest.fixture(scope="module")
def svg(results):
    return chart.render(results, "light")


def test_the_chart_is_the_same_in_every_run(results, svg):
    assert chart.render(results, "light") == svg


def test_the_chart_shows_every_figure(results, svg):
    """matplotlib draws text as outlines, and writes each text in a comment."""
    labels = [
        label for work_panels in chart.panels(results) for bars in work_panels for label in (*bars.names, *bars.labels)
    ]
    assert len(labels) == 2 * 3 * (5 + 5)
    assert all(f"<!-- {label.replace('<', '&lt;')} -->" in svg for label in labels)


def test_charts_of_one_matplotlib_are_compared_by_their_text(svg):
    assert chart.is_same(svg, svg)
    assert not chart.is_same(svg.replace("<path", "<path "), svg)


def test_charts_of_another_matplotlib_are_compared_by_their_figures(svg):
    other = svg.replace("<path", "<path ").replace(f"Matplotlib v{matplotlib.__version__}", "Matplotlib v1.0")
    assert chart.is_same(other, svg)
    assert not chart.is_same(other.replace("ours 34.5 ms", "ours 3.45 ms"), svg)
    assert not chart.is_same("", svg)
