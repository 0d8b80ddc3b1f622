"""Everything that a GPU machine tells, by one command without a network: `python bench/gpu.py`.

It builds the native module, runs tests/gpu, and measures the headline cases beside their alternatives and floors. It
takes at most five minutes on 16 cores. It writes bench/results/gpu-cuda-<card>.json, and `python bench/report.py` makes
tables of that file. An alternative that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LIMIT = 300.0  # seconds of a whole run
LONGEST_CASE = 20.0  # a case begins only if so many seconds are left
SECONDS = 0.5  # of timed rounds per case
NO_COMPILING = "a rehearsal compiles nothing"


def build() -> None:
    """Build the native module in place, for this process and its tests, whether the checkout is installed or not."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, check=True)
    sys.path[:0] = packages = [str(ROOT), str(ROOT / "python")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*packages, os.environ.get("PYTHONPATH", "")])


def run_tests(rehearse: bool) -> dict[str, int | list[str]]:
    """Run tests/gpu, or one file of it in a rehearsal. Returns `outcomes`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        tests = "tests/gpu/test_softmax.py" if rehearse else "tests/gpu"
        command = [sys.executable, "-P", "-m", "pytest", "-q", tests, f"--junitxml={report}", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") and not rehearse:
            command += ["-n", str(min(os.cpu_count() or 1, 15))]
        subprocess.run(command, cwd=ROOT)
        if not report.exists():
            raise RuntimeError("pytest wrote no report of tests/gpu; its messages are above")
        return outcomes(ElementTree.parse(report).getroot())


def outcomes(report: ElementTree.Element) -> dict[str, int | list[str]]:
    """The numbers of tests that passed and were skipped, and the names of the tests that failed."""
    found = {"passed": 0, "skipped": 0, "failed": []}
    for test in report.iter("testcase"):
        if test.find("failure") is not None or test.find("error") is not None:
            found["failed"].append(f"{test.get('classname')}::{test.get('name')}")
        else:
            found["passed" if test.find("skipped") is None else "skipped"] += 1
    return found


def measure(device, rehearse: bool, deadline: float) -> tuple[list[dict], list[str]]:
    """(the measured cases as JSON has them, the names of the cases that were left out for want of time)."""
    import torch
    from gpu_cases import cases
    from harness import TOLERANCE, check_agreement, measure_cold
    from source import source

    from minirl_kernels import batch_invariant_mode

    done, left_out, measured_source = [], [], source()
    for case in cases():
        shape = case.small if rehearse else case.shape
        name = f"{case.what}, {str(case.dtype).removeprefix('torch.')}, {shape}"
        if time.monotonic() > deadline:
            left_out.append(name)
            continue
        print(name, flush=True)
        torch.compiler.reset()  # each case compiles its own shapes, and dynamo limits their number
        with batch_invariant_mode(case.in_mode):
            batch = case.make(**case.small, dtype=case.dtype, device=device)
            quick = [contender for contender in case.contenders(batch) if not contender.compiles]
            check_agreement(quick, batch.restore, TOLERANCE[case.dtype])
            batch = case.make(**shape, dtype=case.dtype, device=device)
            timed = [
                replace(one, missing=NO_COMPILING) if rehearse and one.compiles else one
                for one in case.contenders(batch)
            ]
            contenders = measure_cold(timed, batch.restore, device, 0.0 if rehearse else SECONDS)
        for entry in contenders:
            if entry["missing"]:
                print(f"  {entry['name']} is left out: {entry['missing']}", flush=True)
        done.append(
            {
                "what": case.what,
                "dtype": str(case.dtype).removeprefix("torch."),
                "shape": shape,
                "threads": None,
                "source": measured_source,
                "floor_bytes": case.floor_bytes(batch),
                "flops": case.flops(batch) if case.flops else None,
                "contenders": contenders,
                "bars": [vars(bar) for bar in case.bars],
            }
        )
        del batch, quick, timed
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return done, left_out


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python bench/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="no build, tiny sizes, on any machine; the figures mean nothing"
    )
    parser.add_argument(
        "--results", type=Path, help="folder for the JSON (default: bench/results; a rehearsal has none)"
    )
    arguments = parser.parse_args()
    if not arguments.rehearse:
        build()
    import torch
    from recording import surroundings, write

    if not torch.cuda.is_available() and not arguments.rehearse:
        print(
            "no GPU is visible to torch: this command needs one. --rehearse runs tiny sizes on the CPU", file=sys.stderr
        )
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = surroundings(device)
    tests = run_tests(arguments.rehearse)
    print(f"tests/gpu: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped", flush=True)
    deadline = float("inf") if arguments.rehearse else start + LIMIT - LONGEST_CASE
    done, left_out = measure(device, arguments.rehearse, deadline)
    record = {"op": "gpu", **found, "tests": tests, "left_out": left_out, "cases": done}
    folder = arguments.results or (None if arguments.rehearse else ROOT / "bench" / "results")
    if folder is not None:
        print(f"JSON: {write(folder, record)}")
    print(f"{len(done)} cases measured, {len(left_out)} left out, {time.monotonic() - start:.0f} s")
    return int(bool(tests["failed"]))


if __name__ == "__main__":
    sys.exit(main())
