"""vLLM as the rollout engine. Importing `engine` imports vLLM."""

from __future__ import annotations

import os

from ...errors import MiniRLError
from ..interface import EngineRequest, RolloutEngine

# only errors by default, on the terminal and in the log
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def make_engine(request: EngineRequest) -> RolloutEngine:
    """The engine of a run. Raises MiniRLError where vLLM cannot be imported."""
    try:
        from .engine import VLLMEngine
    except ImportError as error:
        raise MiniRLError(
            f"rollout.engine is 'vllm', which cannot be imported ({error}): install it as docs/vllm.md says"
        ) from None
    return VLLMEngine(
        request.config,
        dtype=request.dtype,
        pad_token_id=request.pad_token_id,
        eos_token_ids=request.eos_token_ids,
        log=request.log,
        records_routing=request.records_routing,
        replays_routing=request.records_routing,
        batch_invariant=request.batch_invariant,
    )
