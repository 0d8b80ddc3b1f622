"""The measurement: contenders take turns in one process, so that the machine's noise hits all of them."""

from __future__ import annotations

import ctypes
import gc
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

MIN_ROUNDS, MAX_ROUNDS = 5, 50
# A run of LONG_RUN seconds averages the noise itself: MIN_LONG_ROUNDS are enough.
# One run is enough if it also takes SLOW times as long as ours.
LONG_RUN, MIN_LONG_ROUNDS, SLOW = 5.0, 3, 2.0
# Eager bfloat16 paths round log-probabilities of about 10 nats to 8 bits. The error of a wrong call is far larger.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class Inputs:
    """The inputs of one case, which all contenders share."""

    def restore(self) -> None:
        """Undo the last run; a class whose inputs no contender overwrites inherits this empty one."""


@dataclass(frozen=True)
class Contender:
    """One implementation of the work. `run` is timed and returns its named outputs; they live until the clock stops."""

    name: str
    run: Callable[[], dict[str, Tensor]]
    kind: Literal["ours", "peer", "floor"] = "peer"
    missing: str | None = None  # the reason why it cannot run here
    compiles: bool = False  # whether its first call of a shape compiles


@dataclass(frozen=True)
class Bar:
    """A bound on `contender` beside `against`.

    With "speed" it is at least `bound` times as fast; with "time" or "memory" it takes at most `bound` times as much.
    """

    contender: str
    measure: Literal["speed", "time", "memory"]
    against: str
    bound: float


def check_agreement(contenders: list[Contender], restore: Callable[[], None], tolerance: float) -> None:
    """Compare every output that a contender shares with the first of ours.

    Raises AssertionError if the relative error in the 2-norm is above `tolerance`.
    """
    outputs = {}
    for contender in contenders:
        if contender.missing is None and contender.kind != "floor":
            restore()
            # copies: an in-place gradient is gone after the next restore()
            outputs[contender.name] = {name: value.double().cpu() for name, value in contender.run().items()}
    ours = outputs[next(contender.name for contender in contenders if contender.kind == "ours")]
    for contender, theirs in outputs.items():
        for name in theirs.keys() & ours.keys():
            value = theirs[name]
            error = ((value - ours[name]).norm() / ours[name].norm()).item()
            assert error <= tolerance, f"{contender}: its {name} is off ours by {error:.2g} (relative, 2-norm)"


def measure(benchmark, contenders: list[Contender], restore: Callable[[], None], device, seconds: float) -> list[dict]:
    """Seconds and peak bytes of every contender, ready for JSON; `restore` runs untimed before every run."""
    present = [contender for contender in contenders if contender.missing is None]
    peaks, once = {}, {}
    for contender in present:
        # the first call compiles, imports and faults in memory
        if contender.compiles or _peak_and_seconds(contender, restore, device, peaks, once) < LONG_RUN:
            _peak_and_seconds(contender, restore, device, peaks, once)
    ours = next(once[contender.name] for contender in present if contender.kind == "ours")
    in_turns = [contender for contender in present if once[contender.name] < max(LONG_RUN, SLOW * ours)]
    one_round = sum(once[contender.name] for contender in in_turns)
    least = MIN_LONG_ROUNDS if one_round > LONG_RUN * len(in_turns) else MIN_ROUNDS
    rounds = min(max(int(seconds / one_round), least), MAX_ROUNDS)
    times = {name: [value] for name, value in once.items()} | _take_turns(benchmark, in_turns, restore, device, rounds)
    return entries(contenders, times, peaks)


def measure_cold(contenders: list[Contender], restore: Callable[[], None], device, seconds: float) -> list[dict]:
    """The same entries as `measure`, in less time: by the events of a GPU with a cold L2 cache, or by a CPU's clock.

    An alternative that raises is left out, and its error is the reason.
    """
    peaks, once, broken = {}, {}, {}
    for contender in contenders:
        if contender.missing is None:
            try:
                restore()
                contender.run()  # compiles and imports
                _peak_and_seconds(contender, restore, device, peaks, once)
            except Exception as error:
                if contender.kind == "ours":
                    raise
                broken[contender.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
                once.pop(contender.name, None)
    present = [contender for contender in contenders if contender.name in once]
    rounds = min(max(int(seconds / sum(once.values())), MIN_LONG_ROUNDS), MAX_ROUNDS)
    times: dict[str, list[float]] = {contender.name: [] for contender in present}
    for _ in range(rounds):
        for contender in present:
            restore()
            times[contender.name].append(_cold_seconds(contender.run, device))
    known = [replace(contender, missing=broken.get(contender.name, contender.missing)) for contender in contenders]
    return entries(known, times, peaks)


def _cold_seconds(run, device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    torch.empty(256 << 20, dtype=torch.int8, device=device).zero_()  # more than the L2 cache of any GPU
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    outputs = run()
    end.record()
    synchronize(device)
    del outputs
    return start.elapsed_time(end) / 1e3


def entries(contenders: list[Contender], times: dict[str, list[float]], peaks: dict[str, int | None]) -> list[dict]:
    """The contenders of a case as JSON has them; one that is not in `times` did not run."""
    return [
        {
            "name": contender.name,
            "kind": contender.kind,
            "missing": contender.missing,
            "peak_bytes": peaks.get(contender.name),
            "seconds": [round(value, 7) for value in times.get(contender.name, [])],
        }
        for contender in contenders
    ]


def _peak_and_seconds(contender, restore, device, peaks, once) -> float:
    restore()
    synchronize(device)
    start = time.perf_counter()
    peaks[contender.name] = peak_memory(contender.run, device)
    once[contender.name] = time.perf_counter() - start
    return once[contender.name]


def _take_turns(benchmark, contenders, restore, device, rounds) -> dict[str, list[float]]:
    """A B C A B C …: pytest-benchmark's setup hook picks the next contender, and its clock times it."""
    turns = itertools.cycle(contenders)
    outputs = []

    def next_turn():
        outputs.clear()  # no contender's time includes freeing the previous gradient
        restore()
        synchronize(device)
        return (next(turns).run,), {}

    def timed(run):
        outputs.append(run())
        synchronize(device)

    benchmark.extra_info["turns"] = [contender.name for contender in contenders]
    benchmark.pedantic(timed, setup=next_turn, rounds=rounds * len(contenders))
    outputs.clear()
    times = benchmark.stats.stats.data
    return {contender.name: times[turn :: len(contenders)] for turn, contender in enumerate(contenders)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one run needs on top of its inputs, its results included; None where the system does not tell.

    On the CPU: growth of the resident set's high-water mark (Linux), which includes native buffers and torch's.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outputs = run()
        torch.cuda.synchronize(device)
        del outputs
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_heap()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the resident set
    except OSError:
        return None
    before = _high_water_mark()
    outputs = run()
    del outputs
    return _high_water_mark() - before


def _return_free_heap() -> None:
    """Return the free pages that the C library keeps, since a run that reused them would seem to need none (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _high_water_mark() -> int:
    status = Path("/proc/self/status").read_text()
    kibibytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kibibytes) * 1024
