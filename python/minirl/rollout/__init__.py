"""Sampling responses: the interface, and one file per inference engine."""

from .interface import RolloutEngine, Rollouts
from .transformers_engine import TransformersEngine

__all__ = ["RolloutEngine", "Rollouts", "TransformersEngine"]
