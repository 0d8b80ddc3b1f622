"""Numbers as the tables and the chart print them."""

from __future__ import annotations


def number(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{number(seconds * 1e3)} ms"


def durations(seconds: list[float]) -> list[str]:
    """Durations that are compared, in one unit: seconds if all last one at least, else milliseconds."""
    if min(seconds) >= 1:
        return [f"{number(value)} s" for value in seconds]
    return [milliseconds(value) for value in seconds]


def memory(size: float | None) -> str:
    """Whole MiB, or tenths below 10 MiB."""
    if size is None:
        return ""
    mebibytes = size / 2**20
    if mebibytes < 0.1:
        return "< 0.1 MiB"
    return f"{mebibytes:,.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"


def tenths_of_mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f} MiB"


def rate(amount: int, seconds: float) -> str:
    """10^9 per second."""
    return f"{amount / seconds / 1e9:.1f}"


def faster(ours: float, theirs: float) -> str:
    """The speed of ours beside theirs, in words."""
    if ours <= theirs:
        return f"{number(theirs / ours)}× faster"
    return f"{number(ours / theirs)}× slower"


def shape(sizes: dict[str, int]) -> str:
    letters = {"tokens": "T", "hidden_size": "H", "vocab_size": "V"}
    return ", ".join(f"{letters.get(name, name)} = {size:,}" for name, size in sizes.items())


def threads(count: int | None) -> str:
    if count is None:
        return "GPU"
    return f"{count} thread{'s' * (count != 1)}"


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table without the columns that show 0.0 or nothing in every row."""
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    kept = [column for column in range(len(head)) if not all(_is_nothing(row[column]) for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line[column] for column in kept)} |\n" for line in lines)


def _is_nothing(cell: str) -> bool:
    return cell in ("", "0.0", "0.0 MiB")
