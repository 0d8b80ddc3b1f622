"""When torch's leaf operations are ours: in a context, in a thread, or in a whole process.

The overrides sit on the CPU and CUDA keys of torch's dispatcher, below autograd, so that gradients run through them.
They are there for all threads while any thread wants them; each call asks whether its own thread does. That answer
travels with torch's thread-local state, so that autograd's threads give the one of the thread that called backward.
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
_holders = 0  # contexts, and threads or the process that enabled the mode: the overrides stay until there is none


@contextmanager
def batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
    """Within, in this thread, the operations of torch that the mode covers give a row bits that depend on it alone.

    enabled: False leaves the mode off within, whatever is around it. Contexts nest, and what was before comes back
    after an exception too. Gradients computed within follow the mode.

    Covered are, for float32, bfloat16 and float16 on the CPU and on NVIDIA and AMD GPUs: the matrix products behind
    matmul, linear, bmm and einsum, grouped_mm, softmax and log_softmax, mean and sum, and on the CPU the elementwise
    functions whose vector and scalar code differ. Not covered are torch's own attention kernels (transformers:
    `attn_implementation="minirl"`) and convolutions; `audit` lists what ran and is not covered. Functions that were
    compiled by torch.compile, whose code no override reaches, run uncompiled while the mode is on in any thread.
    Raises RuntimeError inside a compiled function, and with the reason where a kernel is missing.
    """
    with _change(enabled):
        yield


def enable_batch_invariant_mode() -> None:
    """`batch_invariant_mode` in this thread from now on. MINIRL_BATCH_INVARIANT=1 does it for all threads at import."""
    _set(True)


def disable_batch_invariant_mode() -> None:
    """Ends what enable_batch_invariant_mode began, or in this thread what MINIRL_BATCH_INVARIANT=1 did."""
    _set(False)


def follow_environment() -> None:
    """Raises ValueError for a MINIRL_BATCH_INVARIANT that is neither 0 nor 1."""
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
            "batch_invariant_mode is entered inside a compiled function: it must be around the call of it"
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
