"""The command for a GPU machine: its rehearsal measures every case, and README shows a result of a GPU alone."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import gpu
import pytest
import report
from headlines import render_gpu
from measured_case import contender, measured_case

COMMAND = [sys.executable, str(report.ROOT / "bench" / "gpu.py")]


def run(*arguments):
    # Triton's interpreter off, as on a machine with a GPU
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment)


def test_a_rehearsal_measures_every_case(tmp_path, cpu):
    pytest.importorskip("transformers", reason="transformers is not installed")
    done = run("--rehearse", "--results", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    from gpu_cases import cases

    assert [case["what"] for case in record["cases"]] == [case.what for case in cases()]
    assert record["left_out"] == []
    assert record["tests"]["failed"] == []
    for case in record["cases"]:
        ours, *others = case["contenders"]
        assert ours["kind"] == "ours"
        assert ours["seconds"]
        for entry in others:
            assert bool(entry["seconds"]) != bool(entry["missing"])
            assert not entry["missing"] or f"{entry['name']} is left out: {entry['missing']}" in done.stdout


def test_outcomes_of_the_tests():
    report = """<testsuites><testsuite>
        <testcase classname="a" name="passes"/><testcase classname="a" name="skipped"><skipped/></testcase>
        <testcase classname="a" name="fails"><failure/></testcase>
        <testcase classname="b" name="breaks"><error/></testcase>
    </testsuite></testsuites>"""
    found = gpu.outcomes(ElementTree.fromstring(report))
    assert found == {"passed": 1, "skipped": 1, "failed": ["a::fails", "b::breaks"]}


def gpu_record(device="cuda", failed=()):
    case = measured_case(
        contenders=[
            contender("fused_policy_loss", "ours", [0.004], 1),
            contender("TRL", "peer", [0.006], 1),
            {**contender("Liger", "peer", [], None), "missing": "liger_kernel is not installed"},
        ]
    )
    case |= {"what": "policy loss from logits", "bars": [], "threads": None}
    return {
        "op": "gpu",
        "device": device,
        "machine": "Some Card",
        "environment": {"versions": {"torch": "2.11.0", "triton": "3.6.0"}},
        "tests": {"passed": 600, "skipped": 2, "failed": list(failed)},
        "cases": [case],
    }


def test_the_table_names_the_card_the_versions_and_the_failed_tests():
    text = render_gpu({"gpu-cuda-some-card": gpu_record(failed=["a::b"])})
    assert "On one Some Card, torch 2.11.0, triton 3.6.0: 600 tests of tests/gpu passed, 1 failed." in text
    assert "| TRL | 4 ms | 6 ms | 1.5× faster |" in text
    assert "Liger" not in text


def test_a_rehearsal_is_no_figure_of_a_gpu():
    assert render_gpu({"gpu-cpu-some-processor": gpu_record(device="cpu")}) == ""


def test_the_readme_needs_markers_only_for_a_result(tmp_path):
    (tmp_path / report.RESULTS).mkdir(parents=True)
    for path in (report.ROOT / report.RESULTS).glob("*-cpu-*.json"):
        shutil.copy(path, tmp_path / report.RESULTS)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n{report.GPU_BEGIN}\nold\n{report.GPU_END}\n")
    text = report.generated(tmp_path)[report.README]
    assert text.endswith(f"{report.GPU_BEGIN}\n{report.GPU_END}\n")
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.GPU_BEGIN not in report.generated(tmp_path)[report.README]
