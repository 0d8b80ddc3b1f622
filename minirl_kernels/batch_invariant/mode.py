"""Switches the mode on and off: in a context, in a thread, or in a whole process.

The overrides are registered for the CPU and CUDA keys of torch's dispatcher. These keys are below autograd, so backward
passes use the overrides too. The overrides stay installed for all threads while any thread uses the mode, and each call
checks the state of its own thread. The state is part of torch's thread-local state. Autograd's threads inherit it from
the thread that called backward.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..common.invariance import is_batch_invariant, of_this_thread, set_everywhere, set_in_this_thread
from ..common.uncompiled import hold_uncompiled, release_uncompiled
from . import overrides

_lock = threading.Lock()
_holders = 0  # open contexts, and threads or the process that enabled the mode: at 0 the overrides are removed


@contextmanager
def batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
    """In this thread, inside the block, covered torch operations give a row bits that depend on that row alone.

    enabled: False switches the mode off inside the block. Contexts nest; the earlier state is restored at the end, also
    after an exception. Gradients that are computed inside the block follow the mode.

    Covered for float32, bfloat16 and float16, on the CPU and on NVIDIA and AMD GPUs:
        the matrix products behind matmul, linear, bmm and einsum; grouped_mm;
        softmax, log_softmax, mean and sum;
        on the CPU, the elementwise functions whose vector and scalar code differ.
    Not covered: torch's own attention kernels (in transformers, use `attn_implementation="minirl"`) and convolutions.
    `audit` lists the operations that ran and are not covered.
    Overrides do not reach code compiled by torch.compile. Compiled functions run uncompiled while the mode is on in any
    thread.

    Raises RuntimeError inside a compiled function, and with the reason if a kernel is missing.
    """
    with _change(enabled):
        yield


def enable_batch_invariant_mode() -> None:
    """Switch `batch_invariant_mode` on in this thread. MINIRL_BATCH_INVARIANT=1 does so at import for all threads."""
    _set(True)


def disable_batch_invariant_mode() -> None:
    """Switch the mode off in this thread, after enable_batch_invariant_mode or MINIRL_BATCH_INVARIANT=1."""
    _set(False)


def follow_environment() -> None:
    """Switch the mode on for all threads if MINIRL_BATCH_INVARIANT is 1. Raises ValueError for an invalid value."""
    value = os.environ.get("MINIRL_BATCH_INVARIANT", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"MINIRL_BATCH_INVARIANT is {value!r}: it must be 1, 0 or unset")
    if value == "1":
        _hold()
        set_everywhere()


def _set(enabled: bool) -> None:
    _refuse_compilation()
    before = of_this_thread()
    if enabled and not before:
        _hold()
    set_in_this_thread(enabled)
    if before and not enabled:
        _release()


@contextmanager
def _change(enabled: bool) -> Iterator[None]:
    _refuse_compilation()
    if enabled:
        _hold()
    before = of_this_thread()
    set_in_this_thread(enabled)
    try:
        yield
    finally:
        set_in_this_thread(before)
        if enabled:
            _release()


def _refuse_compilation() -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "batch_invariant_mode is entered inside a compiled function: it must be entered outside, around the call"
        )


def _hold() -> None:
    global _holders
    with _lock:
        if _holders == 0:
            overrides.install(is_batch_invariant)
            hold_uncompiled()
        _holders += 1


def _release() -> None:
    global _holders
    with _lock:
        _holders -= 1
        if _holders == 0:
            release_uncompiled()
            overrides.uninstall()
