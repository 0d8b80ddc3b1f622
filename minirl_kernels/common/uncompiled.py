"""A switch that makes compiled functions run uncompiled, in all threads.

torch has one such setting for the process. A counter of holders keeps the setting on until the last holder releases
it; holders may release it in any order.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

_lock = threading.Lock()
_holders = 0
_force_eager: Any = None  # torch's handle of the setting, which ends it


def hold_uncompiled() -> None:
    """Make all functions run uncompiled from now on. Raises RuntimeError inside a compiled function."""
    global _holders, _force_eager
    with _lock:
        if _holders == 0:
            _force_eager = torch.compiler.set_stance("force_eager")
        _holders += 1


def release_uncompiled() -> None:
    """End one hold_uncompiled. The last release restores the setting from before the first hold."""
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            _force_eager.__exit__(None, None, None)
