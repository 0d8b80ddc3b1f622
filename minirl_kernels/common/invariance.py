"""The state of batch-invariant mode: one for the process, and one per thread that the threads of autograd inherit."""

from __future__ import annotations

import torch

_KEY = "minirl_kernels.batch_invariant"
_everywhere = False


def is_batch_invariant() -> bool:
    """Whether the mode is on in this thread. The state of the thread comes before the state of the process."""
    wanted = of_this_thread()
    return _everywhere if wanted is None else wanted


def of_this_thread() -> bool | None:
    """The state of this thread; None means that the thread follows the process."""
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None


def set_in_this_thread(enabled: bool | None) -> None:
    torch._C._stash_obj_in_tls(_KEY, enabled)


def set_everywhere() -> None:
    global _everywhere
    _everywhere = True
