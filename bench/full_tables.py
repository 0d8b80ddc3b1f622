"""Full tables: every contender and every bar (a ratio to reach) of a result, as Markdown beside its JSON."""

from __future__ import annotations

from records import machine, median, met, quartiles, spread, value
from source import sources_in_words
from units import markdown_table, milliseconds, number, rate, shape, tenths_of_mebibytes, threads

# by the measure of a bar
SIGNS = {"speed": "≥", "time": "≤", "memory": "≤"}
WORDS = {"speed": "times as fast as", "time": "times the time of", "memory": "times the memory of"}


def render_index(results: dict[str, dict]) -> str:
    """A list of the results with their bars, for the folder that holds them."""
    rows = []
    for name, record in results.items():
        verdicts = [met(case, bar) for case in record["cases"] for bar in case["bars"]]
        bars = f"{verdicts.count(True)} of {len(verdicts)}" if verdicts else "none"
        source = sources_in_words([case["source"] for case in record["cases"]])
        rows.append([f"[{record['op']}]({name}.md)", machine(record), bars, source])
    return "# Results\n\n" + markdown_table(["op", "machine", "bars met", "source"], rows)


def render_full(record: dict) -> str:
    """All cases of one result."""
    lines = [f"# {record['op']} on {machine(record)}\n", _surroundings(record)]
    for cases in _by_shape([case for case in record["cases"] if case["bars"]]):
        bars = [(case, bar) for case in cases for bar in case["bars"]]
        lines += [f"## Bars of {record['op']}, {shape(cases[0]['shape'])}\n", _bars(bars)]
    for case in record["cases"]:
        heading = f"## {case['what']}, {case['dtype']}, {shape(case['shape'])}, {threads(case['threads'])}\n"
        lines += [heading, sources_in_words([case["source"]]) + "\n", _case(case)]
    return "\n".join(lines)


def _surroundings(record):
    environment = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return (
        f"{versions}; transparent huge pages: {environment['huge_pages'] or 'unknown'}; "
        f"load average before the run: {environment['load_before']:g}.\n"
    )


def _case(case):
    ours = next(entry for entry in case["contenders"] if entry["kind"] == "ours")
    with_flops = case["flops"] is not None
    rows = []
    for entry in case["contenders"]:
        if entry["missing"]:
            rows.append([entry["name"], f"not run: {entry['missing']}"])
            continue
        low, high = quartiles(entry["seconds"])
        seconds = median(entry)
        rows.append(
            [
                f"`{entry['name']}`" if entry["kind"] == "ours" else entry["name"],
                milliseconds(seconds),
                f"{milliseconds(low)} … {milliseconds(high)}",
                rate(case["floor_bytes"], seconds),
                *([rate(case["flops"], seconds)] if with_flops else []),
                tenths_of_mebibytes(entry["peak_bytes"]),
                f"{number(seconds / median(ours))} ×",
            ]
        )
    rates = ["GB/s", "GFLOP/s"] if with_flops else ["GB/s"]
    return markdown_table(["", "median time", "quartiles", *rates, "memory", f"time / `{ours['name']}`"], rows)


def _bars(bars):
    rows = []
    for case, bar in bars:
        found = value(case, bar)
        rows.append(
            [
                f"{case['dtype']}, {threads(case['threads'])}",
                f"`{bar['contender']}` {WORDS[bar['measure']]} {bar['against']}",
                "" if found is None else number(found) + _quartiles_of(case, bar),
                f"{SIGNS[bar['measure']]} {bar['bound']:g}",
                {True: "met", False: "**missed**", None: "not measured"}[met(case, bar)],
            ]
        )
    return markdown_table(["case", "bar", "value (quartiles of the rounds)", "bound", "verdict"], rows)


def _quartiles_of(case, bar):
    if bar["measure"] == "memory":
        return ""
    low, high = spread(case, bar)
    return f" ({number(low)} … {number(high)})"


def _by_shape(cases):
    """The cases in one list per shape, in the order of the first case of each shape."""
    groups = {}
    for case in cases:
        groups.setdefault(shape(case["shape"]), []).append(case)
    return groups.values()
