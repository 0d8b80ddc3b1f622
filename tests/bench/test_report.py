"""The tables of README.md and bench/README.md come from bench/results and from nothing else."""

import json

import pytest
import report


def contender(name, kind, seconds, peak_bytes, missing=None):
    return {"name": name, "kind": kind, "missing": missing, "peak_bytes": peak_bytes, "seconds": seconds}


def bar(contender, measure, against, bound):
    return {"contender": contender, "measure": measure, "against": against, "bound": bound}


@pytest.fixture
def case():
    """A fast machine: 0.5 GB read and written in 50 ms."""
    return {
        "what": "forward + backward",
        "dtype": "bfloat16",
        "shape": {"tokens": 512, "vocab_size": 151_936},
        "threads": 2,
        "headline": True,
        "floor_bytes": 1_000_000_000,
        "flops": None,
        "contenders": [
            contender("ours", "ours", [0.050, 0.040, 0.060, 0.051, 0.049], 2**20),
            contender("eager", "peer", [0.800, 1.000, 0.600, 0.840, 0.760], 2**30),
            contender("absent", "peer", [], None, missing="absent is not installed"),
            contender("copy", "floor", [0.020, 0.020, 0.030, 0.021, 0.019], 2**29),
        ],
        "bars": [
            bar("ours", "speed", "eager", 10),
            bar("ours", "time", "copy", 2),
            bar("ours", "memory", "copy", 0.015),
            bar("ours", "speed", "absent", 6),
        ],
    }


@pytest.fixture
def record(case):
    return {
        "op": "some_op",
        "device": "cpu",
        "machine": "Some CPU",
        "environment": {
            "versions": {"torch": "2.13.0", "triton": None},
            "processor": {"name": "Some CPU", "cores": 2, "threads": 2},
            "gpus": [],
            "instruction_set": "avx2",
            "huge_pages": None,
            "load_before": 0.01,
        },
        "cases": [case],
    }


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_values_are_ratios_of_medians(case):
    assert [report.value(case, bar) for bar in case["bars"]] == pytest.approx([16, 2.5, 2**-9, None])
    assert [report.met(case, bar) for bar in case["bars"]] == [True, False, True, None]


def test_readme_shows_ours_against_what_ran(record):
    text = report.render_readme([record])
    assert row(text, "call")[-2:] == ["eager", "copy"]
    cells = ["`ours`", "forward + backward", "bfloat16", "2", "50.0 ms", "20.0", "1.0 MiB", "16.0 ×", "0.4 ×"]
    assert row(text, "`ours`") == cells
    assert "2 of the 4 bars" in text
    assert "T = 512, V = 151,936, on Some CPU (2 cores, avx2)" in text


def test_readme_leaves_a_gap_where_a_case_lacks_a_peer(record, case):
    fewer = {**case, "dtype": "float32", "bars": [], "contenders": [case["contenders"][0], case["contenders"][3]]}
    record["cases"].append(fewer)
    text = report.render_readme([record])
    assert row(text, "`ours` | forward + backward | float32")[-2:] == ["", "0.4 ×"]


def test_every_shape_has_its_own_table(record, case):
    record["cases"].append({**case, "shape": {"tokens": 64, "hidden_size": 8, "vocab_size": 100}})
    for text in (report.render_readme([record]), report.render_full([record])):
        first, second = text.index("T = 512, V = 151,936"), text.index("T = 64, H = 8, V = 100")
        assert "16.0" in text[first:second]
        assert "16.0" in text[second:]
    assert report.render_readme([record]).count("4 of the 8 bars") == 1


def test_readme_leaves_other_cases_to_the_full_report(record):
    record["cases"][0]["headline"] = False
    assert report.render_readme([record]) == ""
    assert "bfloat16, T = 512" in report.render_full([record])


def test_full_report_has_every_contender_and_bar(record):
    text = report.render_full([record])
    assert row(text, "eager")[1:] == ["800 ms", "760 ms … 840 ms", "1.2", "1,024.0 MiB", "16.0 ×"]
    assert row(text, "absent")[1] == "not run: absent is not installed"
    verdicts = [
        line.rsplit("|", 2)[1].strip() for line in text.splitlines() if line.startswith("| bfloat16, 2 threads")
    ]
    assert verdicts == ["met", "**missed**", "met", "not measured"]
    assert "torch 2.13.0; transparent huge pages: unknown; load average before the run: 0.01" in text


def test_gflops_where_a_case_counts_them(record):
    record["cases"][0]["flops"] = 5_000_000_000
    text = report.render_full([record])
    assert row(text, "`ours` | 50.0 ms")[3:5] == ["20.0", "100.0"]
    assert "GFLOP/s" in text


@pytest.fixture
def checkout(tmp_path, record):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    (results / "some_op-cpu-some-cpu.json").write_text(json.dumps(record))
    for name in ("README.md", "bench/README.md"):
        (tmp_path / name).write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    return tmp_path


def test_refresh_rewrites_what_is_stale(checkout):
    both = ["README.md", "bench/README.md"]
    assert report.refresh(checkout, write=False) == both
    assert "old" in (checkout / "README.md").read_text()
    assert report.refresh(checkout, write=True) == both
    assert report.refresh(checkout, write=False) == []
    text = (checkout / "README.md").read_text()
    assert text.startswith(f"above\n{report.BEGIN}\n**some_op**")
    assert text.endswith(f"\n{report.END}\nbelow\n")


def test_a_file_without_markers_is_an_error(checkout):
    (checkout / "README.md").write_text("no table here\n")
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        report.refresh(checkout, write=False)


def test_committed_tables_are_those_of_the_committed_results():
    assert report.refresh(write=False) == [], "run python bench/report.py"
