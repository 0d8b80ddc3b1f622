"""Counts the waits of the CPU for the GPU during a call."""

import warnings

import torch


def count_waits(run) -> int:
    """The number of waits in the second of two calls, because the first call compiles."""
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)
