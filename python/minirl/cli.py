"""The command `minirl`: how it ends, whatever happens. `commands` has what it does."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import MiniRLError

# nothing else is imported here: torch takes seconds, and Ctrl-C must end these too in one message


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exits with status 2 and one message for anything that the user can mend, with 130 for Ctrl-C, and with 143 for
    SIGTERM. Where nobody reads its output any more it exits with 141, and says nothing.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            with _terminable():
                if arguments == ["--version"]:
                    print(f"minirl {importlib.metadata.version('minirl-kernels')}")
                    return
                from .commands import run

                run(arguments)
        finally:
            sys.stdout.flush()
    except MiniRLError as error:
        print(f"minirl: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("; ".join(["minirl: stopped", *getattr(stop, "__notes__", [])]), file=sys.stderr)
        sys.exit(143 if isinstance(stop, _Terminated) else 130)
    except BrokenPipeError:
        # the interpreter flushes once more as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by an exception, so that a run keeps its weights."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return

    def end(*_) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
