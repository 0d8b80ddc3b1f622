"""Shows progress: a live bar on a terminal, or a plain line every few seconds in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(console: Console, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yields report(step, text). Call it after each of `total` steps; the phase may end earlier."""
    if not console.is_terminal:
        yield _line_reporter(console, title, total)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, text="")
        yield lambda step, text: bar.update(task, completed=step, text=text)


def _line_reporter(console: Console, title: str, total: int) -> Callable[[int, str], None]:
    last = -SECONDS_BETWEEN_LINES

    def report(step: int, text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if step == total or now - last >= SECONDS_BETWEEN_LINES:
            console.print(f"{title} {step}/{total}  {text}")
            last = now

    return report
