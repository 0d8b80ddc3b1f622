"""From bench/results/*.json to the tables of README.md and bench/README.md: `python bench/report.py [--check]`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench table: begin -->", "<!-- bench table: end -->"
SIGNS = {"speed": "≥", "time": "≤", "memory": "≤"}
WORDS = {"speed": "times as fast as", "time": "times the time of", "memory": "times the memory of"}


def load(folder: Path = RESULTS) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def render_readme(records: list[dict]) -> str:
    """What a visitor needs: our calls on the headline cases, against each alternative."""
    return "\n".join(_summary(record) for record in records if _headlines(record))


def render_full(records: list[dict]) -> str:
    """Everything that was measured, and every bar."""
    return "\n".join(_full(record) for record in records)


def _summary(record):
    lines = [_headline_table(record, cases) for cases in _by_shape(_headlines(record))]
    verdicts = [met(case, bar) for case in record["cases"] for bar in case["bars"]]
    if verdicts:
        lines.append(
            f"{verdicts.count(True)} of the {len(verdicts)} bars that the project set itself for {record['op']} are "
            "met; [bench/README.md](bench/README.md) has each of them.\n"
        )
    return "\n".join(lines)


def _headline_table(record, cases):
    others = list(dict.fromkeys(entry["name"] for case in cases for entry in case["contenders"] if _is_other(entry)))
    rows = [
        [
            f"`{entry['name']}`",
            case["what"],
            case["dtype"],
            _threads(case),
            _time(median(entry)),
            _rate(case["floor_bytes"], entry),
            _memory(entry["peak_bytes"]),
            *(_multiple(_find(case, other), entry) if _has(case, other) else "" for other in others),
        ]
        for case in cases
        for entry in case["contenders"]
        if entry["kind"] == "ours"
    ]
    return (
        f"**{record['op']}**, {_shape(cases[0])}, on {_machine(record)}. The columns after memory say how many times "
        "as long as our call each alternative takes.\n\n"
        + _table(["call", "", "dtype", "threads", "time", "GB/s", "memory", *others], rows)
    )


def _full(record):
    lines = [f"### {record['op']} on {_machine(record)}\n", _surroundings(record)]
    for cases in _by_shape([case for case in record["cases"] if case["bars"]]):
        bars = [(case, bar) for case in cases for bar in case["bars"]]
        lines += [f"#### Bars of {record['op']}, {_shape(cases[0])}\n", _bars(bars)]
    for case in record["cases"]:
        lines += [f"#### {case['what']}, {case['dtype']}, {_shape(case)}, {_threads(case, unit=True)}\n", _case(case)]
    return "\n".join(lines)


def _case(case):
    ours = next(entry for entry in case["contenders"] if entry["kind"] == "ours")
    with_flops = case["flops"] is not None
    rows = []
    for entry in case["contenders"]:
        if entry["missing"]:
            rows.append([entry["name"], f"not run: {entry['missing']}"])
            continue
        low, high = _quartiles(entry["seconds"])
        rows.append(
            [
                f"`{entry['name']}`" if entry["kind"] == "ours" else entry["name"],
                _time(median(entry)),
                f"{_time(low)} … {_time(high)}",
                _rate(case["floor_bytes"], entry),
                *([_rate(case["flops"], entry)] if with_flops else []),
                _memory(entry["peak_bytes"]),
                _multiple(entry, ours),
            ]
        )
    rate = ["GB/s", "GFLOP/s"] if with_flops else ["GB/s"]
    return _table(["", "median time", "quartiles", *rate, "memory", f"× `{ours['name']}`"], rows)


def _bars(bars):
    rows = []
    for case, bar in bars:
        where = [f"{case['dtype']}, {_threads(case, unit=True)}"]
        what = f"`{bar['contender']}` {WORDS[bar['measure']]} {bar['against']}"
        found, verdict = value(case, bar), met(case, bar)
        rows.append(
            [
                *where,
                what,
                "" if found is None else _number(found) + _spread(case, bar),
                f"{SIGNS[bar['measure']]} {bar['bound']:g}",
                {True: "met", False: "**missed**", None: "not measured"}[verdict],
            ]
        )
    return _table(["case", "what", "value (quartiles of the rounds)", "bar", ""], rows)


def value(case: dict, bar: dict) -> float | None:
    """What a bar is about, as a ratio of medians (or of peak memory); None if one side was not measured."""
    of, against = _find(case, bar["contender"]), _find(case, bar["against"])
    if bar["measure"] == "memory":
        if of["peak_bytes"] is None or not against["peak_bytes"]:
            return None
        return of["peak_bytes"] / against["peak_bytes"]
    if not of["seconds"] or not against["seconds"]:
        return None
    ratio = median(of) / median(against)
    return 1 / ratio if bar["measure"] == "speed" else ratio


def met(case: dict, bar: dict) -> bool | None:
    found = value(case, bar)
    if found is None:
        return None
    return found >= bar["bound"] if bar["measure"] == "speed" else found <= bar["bound"]


def _spread(case, bar):
    """Quartiles of the ratio within each round, whose runs were neighbours in time."""
    of, against = _find(case, bar["contender"]), _find(case, bar["against"])
    if bar["measure"] == "memory":
        return ""
    if bar["measure"] == "speed":
        of, against = against, of
    if len(of["seconds"]) == len(against["seconds"]):  # in the same rounds
        low, high = _quartiles([mine / theirs for mine, theirs in zip(of["seconds"], against["seconds"], strict=True)])
    else:
        low, high = (value / median(against) for value in _quartiles(of["seconds"]))
    return f" ({_number(low)} … {_number(high)})"


def median(entry: dict) -> float | None:
    return statistics.median(entry["seconds"]) if entry["seconds"] else None


def _quartiles(values):
    if len(values) == 1:
        return values * 2
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _headlines(record):
    cases = [case for case in record["cases"] if case["headline"]]
    return sorted(cases, key=lambda case: (case["what"], case["dtype"], case["threads"] or 0))


def _by_shape(cases):
    """Lists of cases of one shape each, in the order of their first ones."""
    groups = {}
    for case in cases:
        groups.setdefault(_shape(case), []).append(case)
    return groups.values()


def _is_other(entry):
    return entry["kind"] != "ours" and not entry["missing"]


def _has(case, name):
    return any(entry["name"] == name for entry in case["contenders"])


def _find(case, name):
    return next(entry for entry in case["contenders"] if entry["name"] == name)


def _machine(record):
    environment = record["environment"]
    if record["device"] == "cuda":
        return record["machine"]
    return f"{record['machine']} ({environment['processor']['cores']} cores, {environment['instruction_set']})"


def _surroundings(record):
    environment = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"{versions}; transparent huge pages: {environment['huge_pages'] or 'unknown'}; "
        f"load average before the run: {environment['load_before']:g}.\n"
    )


def _shape(case):
    letters = {"tokens": "T", "hidden_size": "H", "vocab_size": "V"}
    return ", ".join(f"{letters.get(name, name)} = {size:,}" for name, size in case["shape"].items())


def _threads(case, unit=False):
    if case["threads"] is None:
        return "GPU" if unit else ""
    return str(case["threads"]) + (" thread" + "s" * (case["threads"] != 1)) * unit


def _multiple(entry, ours):
    return f"{_number(median(entry) / median(ours))} ×" if entry["seconds"] else ""


def _rate(amount, entry):
    return f"{amount / median(entry) / 1e9:.1f}"


def _time(seconds):
    return f"{_number(seconds * 1e3)} ms"


def _memory(size):
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def _number(value):
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def replace_table(text: str, table: str, name: str) -> str:
    """`text` with what stands between the markers replaced; ValueError where there are no markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{name} must hold the lines {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}{END}{rest.split(END)[1]}"


def refresh(root: Path = ROOT, *, write: bool) -> list[str]:
    """The files whose table is not that of bench/results; rewritten if `write`."""
    records = load(root / "bench" / "results")
    stale = []
    for name, render in (("README.md", render_readme), ("bench/README.md", render_full)):
        text = (root / name).read_text()
        fresh = replace_table(text, render(records), name)
        if fresh != text:
            stale.append(name)
            if write:
                (root / name).write_text(fresh)
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench/report.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is stale")
    check = parser.parse_args().check
    stale = refresh(write=not check)
    for name in stale:
        print(f"{name}: {'its table is stale: run python bench/report.py' if check else 'table written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
