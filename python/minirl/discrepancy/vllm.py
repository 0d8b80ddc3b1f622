"""vLLM as mu: the trainer's vLLM engine, with records of its modules and logits on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from minirl_kernels.discrepancy import Scores
from minirl_kernels.discrepancy.engines import GeneratingEngine, TokenIds
from minirl_kernels.discrepancy.modules import RemoteModel
from minirl_kernels.moe.routers import routers

from ..config import RolloutConfig
from ..errors import MiniRLError
from .engines import scores_of
from .settings import InferenceSettings


@contextmanager
def vllm_engine(
    model: PreTrainedModel,
    settings: InferenceSettings,
    sampling: RolloutConfig,
    end_token_ids: list[int],
    *,
    replays_routing: bool,
    longest_prompt: int,
    log: Path,
) -> Iterator[GeneratingEngine]:
    """The engine mu, which is closed at the end of the block. Raises MiniRLError.

    sampling: settings except engine and vllm. replays_routing: whether pi records or replays experts.
    log: file for vLLM's output.
    """
    try:
        from ..rollout.vllm.engine import PROBE, VLLMEngine
    except ImportError as error:
        raise MiniRLError(
            f"--mu.engine is 'vllm', which cannot be imported ({error}): install it as docs/vllm.md says"
        ) from None
    records_modules = model.device.type == "cpu"
    if settings.quantization is not None and records_modules:
        raise MiniRLError(
            f"--mu.quantization is {settings.quantization!r} with --mu.engine vllm on a CPU: it must be None there"
        )
    # vLLM requires a cache that holds the longest allowed sequence
    length = max(longest_prompt + sampling.max_new_tokens, len(PROBE) + 1)
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    vllm = replace(settings.vllm, args={"max_model_len": length, **settings.vllm.args})
    engine = VLLMEngine(
        replace(sampling, engine="vllm", vllm=vllm),
        dtype=settings.dtype,
        pad_token_id=end_token_ids[0],
        eos_token_ids=end_token_ids,
        log=log,
        records_routing=_has_routers(model),
        replays_routing=replays_routing,
        keeps_logits=records_modules,
        batch_invariant=settings.batch_invariant,
    )
    try:
        engine.update_weights(model)
        yield _Generator(engine, engine if records_modules else None)
    finally:
        engine.close()


def _has_routers(model: PreTrainedModel) -> bool:
    try:
        routers(model)
    except ValueError:  # the report gives the reason
        return False
    return True


class _Generator:
    def __init__(self, engine, model: RemoteModel | None):
        self._engine, self.model = engine, model

    def generate(self, prompts: TokenIds, *, seed: int) -> tuple[list[list[int]], Scores]:
        rollouts = self._engine.generate(prompts, 1, seed=seed)
        return rollouts.responses(), scores_of(rollouts)
