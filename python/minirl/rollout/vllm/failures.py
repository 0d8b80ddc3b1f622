"""vLLM's failures as one message each, and its output in a file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import MiniRLError

# "ValueError: …" at the start of a line or after a logger's prefix; pydantic says "Value error, …" on a line of its own
_CAUSE = re.compile(
    r"(?:^|\] |\s)(?:\w+\.)*(?:\w*(?:Error|Exception|Interrupt)): (?P<python>.+)|Value error, (?P<pydantic>.+)"
)
_REFERS_ON = ("Engine core initialization failed", "EngineCore encountered an issue")


@contextmanager
def written_to(log: Path) -> Iterator[None]:
    """What this process and those that it starts write to the terminal goes to the end of a file instead."""
    log.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(number) for number in (1, 2)]
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def as_one_message(doing: str, log: Path) -> Iterator[None]:
    """Raises MiniRLError for whatever goes wrong inside. doing: what vLLM was to do; log: file of its output."""
    start = log.stat().st_size if log.exists() else 0
    try:
        yield
    except MiniRLError:
        raise
    except Exception as error:
        # the cause of a failure in vLLM's own process is in its output alone
        output = log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""
        raise MiniRLError(
            f"vLLM failed to {doing}: {cause(f'{type(error).__name__}: {error}', output)} ({log})"
        ) from error


def cause(error: str, output: str) -> str:
    """What went wrong, in one line: of an error, or of its process's output where the error refers to that."""
    for text in (error, output):
        found = [match["python"] or match["pydantic"] for match in _CAUSE.finditer(text)]
        found = [line.strip() for line in found if not line.startswith(_REFERS_ON)]
        if found:
            return found[-1] if text is output else found[0]
    return "its process has ended" if any(text in error for text in _REFERS_ON) else error
