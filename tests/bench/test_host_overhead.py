"""The host's time per op is measured by one command, with and without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
BENCH = Path(__file__).parents[2] / "bench"


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "host_overhead.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_table_of_layers():
    done = run("--rounds", "2", "rms_norm", "softmax")
    assert done.returncode == 0, done.stderr
    head, _, *rows = (line for line in done.stdout.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "call", "checks", "autograd", "backend", "launch", "all",
    ]  # fmt: skip
    table = {cells[0]: [float(cell) for cell in cells[1:]] for cells in map(split, rows)}
    assert set(table) == {"rms_norm", "softmax"}
    for *layers, whole in (table["rms_norm"], table["softmax"]):
        assert all(layer > 0 for layer in layers)
        assert sum(layers) >= 0.9 * whole


def split(row):
    return [cell.strip() for cell in row.split("|")[1:-1]]
