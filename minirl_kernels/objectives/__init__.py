"""The objectives, one class per file. The docstring of `Objective` says how to write a new one."""

from .base import Level, Objective, TokenRatios, times
from .cispo import CISPO
from .dppo import DPPO
from .dual_clip import DualClip
from .grpo import GRPO
from .gspo import GSPO
from .minirl import MiniRL
from .reinforce import Reinforce
from .sapo import SAPO
from .sequence_is import SequenceIS
from .two_sided_clip import TwoSidedClip

# the objectives that PolicyLossConfig knows by name
NAMED: dict[str, type[Objective]] = {
    "minirl": MiniRL,
    "reinforce": Reinforce,
    "sequence_is": SequenceIS,
    "grpo": GRPO,
    "cispo": CISPO,
    "gspo": GSPO,
}

__all__ = [
    "CISPO",
    "DPPO",
    "GRPO",
    "GSPO",
    "NAMED",
    "SAPO",
    "DualClip",
    "Level",
    "MiniRL",
    "Objective",
    "Reinforce",
    "SequenceIS",
    "TokenRatios",
    "TwoSidedClip",
    "times",
]
