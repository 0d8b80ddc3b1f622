"""Experts whose weights the CPU kernels need not bring into order at every call: for rollouts between two updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedExperts:
    """One projection of all experts, copied into the order of the CPU's matmul; pack_experts makes it."""

    words: Tensor  # int32, on the CPU
    stride: int  # of words, from expert to expert
    shape: torch.Size  # of the projection
    dtype: torch.dtype  # of the projection
    instruction_set: str  # whose order it is
