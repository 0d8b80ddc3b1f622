"""Results: reading bench/results/*.json, and the ratios and verdicts that follow from them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path


def load(folder: Path) -> dict[str, dict]:
    """The results in a folder, by the name of their file without its ending."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def find(case: dict, name: str) -> dict:
    """The contender of a case by its name; raises ValueError if there is none."""
    entries = {entry["name"]: entry for entry in case["contenders"]}
    if name not in entries:
        raise ValueError(f"{case['what']!r} has no contender {name!r}; its contenders are {', '.join(entries)}")
    return entries[name]


def measured(case: dict, name: str) -> dict:
    """The contender of a case by its name; raises ValueError if it did not run."""
    entry = find(case, name)
    if not entry["seconds"]:
        raise ValueError(f"{name!r} did not run in {case['what']!r} ({entry['missing']}); it must be measured")
    return entry


def median(entry: dict) -> float | None:
    """Seconds; None for a contender that did not run."""
    return statistics.median(entry["seconds"]) if entry["seconds"] else None


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def value(case: dict, bar: dict) -> float | None:
    """The measured side of a bar: a ratio of medians or of peak memory; None if one contender was not measured."""
    of, against = find(case, bar["contender"]), find(case, bar["against"])
    if bar["measure"] == "memory":
        if of["peak_bytes"] is None or not against["peak_bytes"]:
            return None
        return of["peak_bytes"] / against["peak_bytes"]
    if not of["seconds"] or not against["seconds"]:
        return None
    ratio = median(of) / median(against)
    return 1 / ratio if bar["measure"] == "speed" else ratio


def spread(case: dict, bar: dict) -> tuple[float, float]:
    """Quartiles of a bar's ratio of times, taken within each round, whose runs were neighbours in time."""
    of, against = find(case, bar["contender"]), find(case, bar["against"])
    if bar["measure"] == "speed":
        of, against = against, of
    if len(of["seconds"]) == len(against["seconds"]):  # in the same rounds
        return quartiles([mine / theirs for mine, theirs in zip(of["seconds"], against["seconds"], strict=True)])
    low, high = quartiles(of["seconds"])
    return low / median(against), high / median(against)


def met(case: dict, bar: dict) -> bool | None:
    """Whether a bar is met; None if it was not measured."""
    found = value(case, bar)
    if found is None:
        return None
    return found >= bar["bound"] if bar["measure"] == "speed" else found <= bar["bound"]


def machine(record: dict) -> str:
    """The processor with its cores and instruction set, or the GPU."""
    environment = record["environment"]
    if record["device"] == "cuda":
        return record["machine"]
    return f"{record['machine']} ({environment['processor']['cores']} cores, {environment['instruction_set']})"


def short_machine(record: dict) -> str:
    """The processor in few words with its instruction set, or the GPU."""
    if record["device"] == "cuda":
        return record["machine"]
    name = record["machine"].replace("(R)", "").removesuffix(" Processor")
    return f"{name}, {record['environment']['instruction_set']}"
