"""torch.compile set aside: functions that were compiled run as they were written, in all threads.

torch has one such setting for the process. A count of its holders keeps it on until the last of them lets go, in
whatever order they do.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

_lock = threading.Lock()
_holders = 0
_before: Any = None  # the setting before the first holder


def hold_uncompiled() -> None:
    """From now on nothing runs compiled. Raises RuntimeError inside a compiled function."""
    global _holders, _before
    with _lock:
        if _holders == 0:
            _before = torch.compiler.set_stance("force_eager")
        _holders += 1


def release_uncompiled() -> None:
    """Ends one hold_uncompiled: after the last, torch.compile is as it was before the first."""
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            _before.__exit__(None, None, None)
