"""Two gloo processes for a test of collectives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 2


def run_ranks(check: Callable, folder: Path, *args) -> None:
    """Call check(rank, *args) in each of two processes of one group. check must be a module's function."""
    torch.multiprocessing.spawn(_in_group, (check, folder / "store", args), nprocs=RANKS)


def _in_group(rank: int, check: Callable, store: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    check(rank, *args)
    dist.barrier()  # a rank that exits closes connections that the other rank may still use
    dist.destroy_process_group()
