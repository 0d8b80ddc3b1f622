"""Sampling responses: the interface, and one file per inference engine."""

from .checks import Asked, PolicyLimits, check_rollouts
from .interface import RolloutEngine, Rollouts
from .transformers_engine import TransformersEngine

__all__ = ["Asked", "PolicyLimits", "RolloutEngine", "Rollouts", "TransformersEngine", "check_rollouts"]
