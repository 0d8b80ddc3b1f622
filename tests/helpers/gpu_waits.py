"""How often a call makes the CPU wait for the GPU."""

import warnings

import torch


def count_waits(run) -> int:
    """Of the second of two calls, because the first one compiles."""
    run()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)
