"""Compares an inference engine (mu) with a training engine (pi), and finds the first module in which they differ."""

from .compare import compare_engines
from .engines import GeneratingEngine, Rescored, Scores, ScoringEngine
from .probabilities import full_vocabulary_kl, sampled_token_metrics
from .report import DiscrepancyReport

__all__ = [
    "DiscrepancyReport",
    "GeneratingEngine",
    "Rescored",
    "Scores",
    "ScoringEngine",
    "compare_engines",
    "full_vocabulary_kl",
    "sampled_token_metrics",
]
