"""Turns each failure of vLLM into one message, and writes vLLM's output to a file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import TypeVar

from ...errors import MiniRLError

# "ValueError: …" at the start of a line or of a log message; pydantic adds a line with the message of a check
_CAUSE = re.compile(r"(?:^|\] |\s)(?:\w+\.)*\w*(?:Error|Exception): (.+)")
_CHECK = re.compile(r"Value error, (.+?)(?: \[type=|$)", re.MULTILINE)
Result = TypeVar("Result")

ENDED = "its process has ended"
_REFERS_ON = ("Engine core initialization failed", "EngineCore encountered an issue")


@contextmanager
def written_to(log: Path) -> Iterator[None]:
    """Appends the terminal output of this process and of its child processes to a file instead."""
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
    """Turns any exception inside the block into a MiniRLError. doing: vLLM's task; log: file of vLLM's output."""
    start = log.stat().st_size if log.exists() else 0
    try:
        yield
    except MiniRLError:
        raise
    except Exception as error:
        # a failure in vLLM's separate process shows its cause only in the output
        output = log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""
        raise MiniRLError(
            f"vLLM failed to {doing}: {cause(f'{type(error).__name__}: {error}', output)} ({log})"
        ) from error


def cause(error: str, output: str) -> str:
    """The cause of an error in one line: from the error, or from the output if the error refers to it."""
    for text in (error, output):
        checks = _CHECK.findall(text)
        if checks:
            return checks[0]
        causes = [line.strip() for line in _CAUSE.findall(text) if not line.startswith(_REFERS_ON)]
        if causes:
            return causes[-1]
    return ENDED if any(text in error for text in _REFERS_ON) else error


def while_alive(processes: Sequence[BaseProcess], call: Callable[[], Result]) -> Result:
    """Run call() in a thread. Raises RuntimeError if a process ends first, since vLLM would wait forever."""
    if not processes:
        return call()
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    while True:
        ended = not all(process.is_alive() for process in processes)
        try:
            return answer.result(timeout=2.0 if ended else 0.5)  # an ended process may have sent a last message
        except NotYet:
            if ended:
                raise RuntimeError(ENDED) from None
