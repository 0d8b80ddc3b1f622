"""How operations of aten are put into torch's dispatcher as ours, and taken out again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES
from .operations import operations

_library: torch.library.Library | None = None


class _Calls(threading.local):
    count = 0


_calls = _Calls()


def calls() -> int:
    """How many operations of this thread have run as ours."""
    return _calls.count


def install(is_wanted: Callable[[], bool]) -> None:
    """Override, for all threads; a call in a thread that does not want ours stays torch's."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    for key in ("CPU", "CUDA") if torch.version.cuda or torch.version.hip else ("CPU",):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is overridden
            for name, ours in operations(key):
                _override(name, key, ours, is_wanted)


def uninstall() -> None:
    global _library
    _library._destroy()
    _library = None


def _override(name: str, key: str, ours: Callable[..., Tensor], is_wanted: Callable[[], bool]) -> None:
    call_stock = torch.library.get_kernel(f"aten::{name}", key).call_boxed

    def kernel(keys, *args, **kwargs):
        if is_wanted() and args[0].dtype in FLOAT_DTYPES:
            out = ours(*args, **kwargs)
            if out is not NotImplemented:
                _calls.count += 1
                return out
        return call_stock(keys, *args, **kwargs)

    _library.impl(name, kernel, key, with_keyset=True)
