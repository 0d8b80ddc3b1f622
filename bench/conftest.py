"""`pytest bench/`: its options, device and thread counts, the fixture `compare`, and the JSON and tables at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import recording
import report
import torch
from full_tables import render_full
from harness import TOLERANCE, check_agreement, measure
from source import source

RECORDS = pytest.StashKey[dict]()
# on a CPU's sizes a GPU would spend most of its time on launches
DEFAULT_SCALE = {"cpu": 1.0, "cuda": 4.0}


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--scale", type=float, help="multiply every case's tokens by this (default: 1; 4 on a GPU)")
    group.addoption(
        "--seconds", type=float, default=10, help="length of a case's timed rounds, at least 3 (default: 10)"
    )
    group.addoption("--machine", help="a name for this machine (default: the model of its GPU or processor)")
    group.addoption(
        "--results", type=Path, default=report.ROOT / report.RESULTS, help="folder for the JSON (default: %(default)s)"
    )


def pytest_configure(config):
    config.stash[RECORDS] = {}
    # torch.compile itself uses torch.jit, and warns again in every case
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit:DeprecationWarning")


def pytest_generate_tests(metafunc):
    """Run every benchmark on one thread and on all threads; on a GPU once."""
    if "compare" in metafunc.fixturenames:
        counts = [None] if torch.cuda.is_available() else sorted({1, torch.get_num_threads()})
        # indirect: the fixture below sets the number
        metafunc.parametrize(
            "threads", counts, indirect=True, ids=lambda count: "gpu" if count is None else f"{count}threads"
        )


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def surroundings(request, device):
    """The machine and its versions, taken before anything ran."""
    return recording.surroundings(device, request.config.getoption("machine"))


@pytest.fixture(scope="session")
def measured_source():
    """The commit that is measured, taken before anything ran."""
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
    """A function that checks all contenders against ours on a small batch, then times them in turns on a large one."""
    config = request.config
    scale = config.getoption("scale") or DEFAULT_SCALE[device.type]

    def run(what, *, make, contenders, shape, small, dtype, floor_bytes, flops=None, bars=()):
        """Measure one case of this file's op.

        make(**shape): the `Inputs`. contenders(inputs): a list of `Contender`s with one of ours at least.
        shape, small: sizes of the timed batch and of the checked batch. floor_bytes(inputs): bytes that any
        implementation must move. flops(inputs): floating-point operations, if arithmetic limits the op.
        bars: the `Bar`s of the case.
        """
        assert threads in (None, torch.get_num_threads())
        torch.compiler.reset()  # each case compiles its own shapes, and dynamo limits their number
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
            "floor_bytes": floor_bytes(batch),
            "flops": flops(batch) if flops else None,
            "contenders": measure(benchmark, contenders(batch), batch.restore, device, config.getoption("seconds")),
            "bars": [vars(bar) for bar in bars],
        }
        op = request.path.stem.removeprefix("bench_")
        record = config.stash[RECORDS].setdefault(op, {"op": op, **surroundings, "cases": []})
        record["cases"].append(case)

    return run


def pytest_benchmark_group_stats():
    """Suppress pytest-benchmark's own table: its rows would mix the contenders of a case."""
    return []


def pytest_sessionfinish(session):
    folder = session.config.getoption("results")
    for record in session.config.stash[RECORDS].values():
        recording.write(folder, record)


def pytest_terminal_summary(terminalreporter, config):
    records = list(config.stash[RECORDS].values())
    if records:
        terminalreporter.write_sep("=", "measured")
        for record in records:
            terminalreporter.write_line(render_full(record))
        terminalreporter.write_line(f"JSON: {config.getoption('results')}")
        terminalreporter.write_line("`python bench/report.py` makes the tables and charts of bench/results.")
