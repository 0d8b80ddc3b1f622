"""The entry point of the command `minirl`: handles errors, signals and the exit status. See `commands`."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .errors import MiniRLError

# Nothing else is imported here, since importing torch takes seconds, and Ctrl-C must also end that with one message.


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exit status: 2 with one message for an error that the user can correct; 130 for Ctrl-C; 143 for SIGTERM; 141,
    without a message, for a closed pipe.
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
        # the interpreter flushes stdout again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises an exception inside the block, as Ctrl-C does, so that a run saves its weights."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return

    def end(*_) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
