"""`pytest bench/`: options, the device, the thread counts, `compare`, the tables at the end, the JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from pathlib import Path

import pytest
import report
import torch
from full_tables import render_full
from harness import TOLERANCE, check_agreement, measure
from source import source

from minirl_kernels.env import environment

RECORDS = pytest.StashKey[dict]()
PEER_PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy")
# launch costs would be most of a GPU's time on what a CPU does in a second
DEFAULT_SCALE = {"cpu": 1.0, "cuda": 4.0}


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--scale", type=float, help="multiply every case's tokens by this (default: 1; 4 on a GPU)")
    group.addoption(
        "--seconds", type=float, default=10, help="length of a case's timed rounds, at least 3 (default: 10)"
    )
    group.addoption("--machine", help="what to call this machine (default: the model of its GPU or processor)")
    group.addoption(
        "--results", type=Path, default=report.ROOT / report.RESULTS, help="folder for the JSON (default: %(default)s)"
    )


def pytest_configure(config):
    config.stash[RECORDS] = {}
    # torch.compile's own use of torch.jit, repeated for every case
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")


def pytest_generate_tests(metafunc):
    """Every benchmark on one thread and on all of them; a GPU's does not care."""
    if "compare" in metafunc.fixturenames:
        counts = [None] if torch.cuda.is_available() else sorted({1, torch.get_num_threads()})
        # indirect: through the fixture below, which is what sets the number
        metafunc.parametrize(
            "threads", counts, indirect=True, ids=lambda count: "gpu" if count is None else f"{count}threads"
        )


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def surroundings(request, device):
    """What a reader of the numbers must know, taken before anything ran."""
    found = environment()
    model = found["gpus"][0] if device.type == "cuda" else found["processor"]["name"]
    return {
        "device": device.type,
        "machine": request.config.getoption("machine") or model,
        "environment": {
            "versions": found["versions"] | {name: _version(name) for name in PEER_PACKAGES},
            "processor": found["processor"],
            "gpus": found["gpus"],
            "instruction_set": found["native"]["picked"],
            "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            "load_before": round(os.getloadavg()[0], 2),
        },
    }


@pytest.fixture(scope="session")
def measured_source():
    """The commit, taken before anything ran."""
    return source()


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    if request.param is not None:
        torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark, request, device, surroundings, measured_source, threads):
    """Check all contenders against ours on a small batch, then time them in turns on the large one."""
    config = request.config
    scale = config.getoption("scale") or DEFAULT_SCALE[device.type]

    def run(what, *, make, contenders, shape, small, dtype, floor_bytes, flops=None, bars=(), headline=False):
        """One case of this file's op.

        make(**shape) is a batch with restore(); contenders(batch) lists what competes on it; floor_bytes(batch) is
        what no way of doing the work can do without moving, flops(batch) likewise where arithmetic is the limit.
        bars: what is promised of the case. headline: whether the project's README shows it.
        """
        assert threads in (None, torch.get_num_threads())
        torch.compiler.reset()  # each case compiles its own shapes; without this dynamo's limit is soon met
        batch = make(**small)
        check_agreement(contenders(batch), batch.restore, TOLERANCE[dtype])
        if benchmark.disabled:
            pytest.skip("contenders agree with ours; nothing was timed (--benchmark-disable)")
        shape = {**shape, "tokens": max(small["tokens"], round(shape["tokens"] * scale))}
        batch = make(**shape)
        case = {
            "what": what,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": shape,
            "threads": threads,
            "source": measured_source,
            "headline": headline,
            "floor_bytes": floor_bytes(batch),
            "flops": flops(batch) if flops else None,
            "contenders": measure(benchmark, contenders(batch), batch.restore, device, config.getoption("seconds")),
            "bars": [vars(bar) for bar in bars],
        }
        op = request.path.stem.removeprefix("bench_")
        record = config.stash[RECORDS].setdefault(op, {"op": op, **surroundings, "cases": []})
        record["cases"].append(case)

    return run


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(path):
    return Path(path).read_text().strip() if Path(path).exists() else None


def pytest_benchmark_group_stats():
    """No table of pytest-benchmark's own: its rows would mix the contenders of a case."""
    return []


def pytest_sessionfinish(session):
    folder = session.config.getoption("results")
    for record in session.config.stash[RECORDS].values():
        folder.mkdir(parents=True, exist_ok=True)
        machine = re.sub(r"[^a-z0-9]+", "-", record["machine"].lower()).strip("-")
        path = folder / f"{record['op']}-{record['device']}-{machine}.json"
        path.write_text(_one_line_per_list(json.dumps(record, indent=1)) + "\n")


def _one_line_per_list(text):
    return re.sub(r"\[[\s\d.,e-]*\]", lambda numbers: " ".join(numbers[0].split()), text)


def pytest_terminal_summary(terminalreporter, config):
    records = list(config.stash[RECORDS].values())
    if records:
        terminalreporter.write_sep("=", "measured")
        for record in records:
            terminalreporter.write_line(render_full(record))
        terminalreporter.write_line(f"JSON: {config.getoption('results')}")
        terminalreporter.write_line("`python bench/report.py` makes the tables and charts of bench/results.")
