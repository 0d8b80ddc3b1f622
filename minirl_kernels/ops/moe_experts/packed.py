"""Expert weights that were copied once into the memory order of the CPU kernels, for rollouts between two updates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedExperts:
    """One projection of all experts, copied by pack_experts into the memory order of the CPU kernels.

    words: int32, on the CPU; the weights.
    stride: number of words from one expert to the next.
    shape, dtype: of the projection.
    instruction_set: the instruction set whose memory order the copy has.
    """

    words: Tensor
    stride: int
    shape: torch.Size
    dtype: torch.dtype
    instruction_set: str
