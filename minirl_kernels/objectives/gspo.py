"""GSPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .grpo import GRPO


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """GSPO (arXiv 2507.18071) in its token form: GRPO with the geometric mean over the response as r."""

    level: ClassVar = "sequence_mean"

    clip_ratio_low: float = 3e-4
    clip_ratio_high: float = 4e-4
