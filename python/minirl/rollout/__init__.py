"""Sampling responses: the interface, and one file per inference engine.

An engine is a module of this package, called as `rollout.engine` calls it, with `make_engine(request)`.
"""

import importlib

from .checks import Asked, PolicyLimits, check_rollouts
from .interface import EngineRequest, RolloutEngine, Rollouts
from .transformers import TransformersEngine

__all__ = [
    "Asked",
    "EngineRequest",
    "PolicyLimits",
    "RolloutEngine",
    "Rollouts",
    "TransformersEngine",
    "check_rollouts",
    "make_engine",
]


def make_engine(request: EngineRequest) -> RolloutEngine:
    """The engine that `request.config.engine` names, without weights. Raises MiniRLError.

    Its module is imported here, when a run asks for it: an engine may need packages that others do not.
    """
    return importlib.import_module(f".{request.config.engine}", __name__).make_engine(request)
