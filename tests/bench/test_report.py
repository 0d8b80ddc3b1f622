"""The README's table, the full tables and the charts come from bench/results only."""

import json
import shutil

import pytest
import report
from headlines import COMPARISONS

README = "README.md"
CHARTS = [f"docs/figures/headline-{theme}.svg" for theme in ("light", "dark")]
LOSS = "bench/results/fused_policy_loss-cpu-amd-epyc"


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the committed results, before anything is generated from them."""
    (tmp_path / report.RESULTS).mkdir(parents=True)
    for path in (report.ROOT / report.RESULTS).glob("*.json"):
        shutil.copy(path, tmp_path / report.RESULTS)
    (tmp_path / README).write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    return tmp_path


def double_our_time(path):
    record = json.loads(path.read_text())
    for case in record["cases"]:
        case["contenders"][0]["seconds"] = [2 * seconds for seconds in case["contenders"][0]["seconds"]]
    path.write_text(json.dumps(record))


def test_committed_files_are_those_of_the_committed_results():
    assert report.refresh(write=False) == [], "run python bench/report.py"


def test_refresh_writes_what_is_stale_and_nothing_else(checkout):
    everything = report.refresh(checkout, write=False)
    assert {README, "bench/results/README.md", f"{LOSS}.md", *CHARTS} <= set(everything)
    assert "old" in (checkout / README).read_text()
    assert report.refresh(checkout, write=True) == everything
    assert report.refresh(checkout, write=False) == []
    text = (checkout / README).read_text()
    assert text.startswith(f"above\n{report.BEGIN}\n| ")
    assert text.endswith(f"\n{report.END}\nbelow\n")
    double_our_time(checkout / f"{LOSS}.json")
    changed = {README, "bench/results/README.md", f"{LOSS}.md", *CHARTS}
    assert set(report.refresh(checkout, write=False)) == changed


def test_the_readme_has_at_most_ten_rows():
    assert len(COMPARISONS) <= 10


def test_a_file_without_markers_is_an_error(checkout):
    (checkout / README).write_text("no table here\n")
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        report.refresh(checkout, write=False)
