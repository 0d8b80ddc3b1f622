"""vLLM's CPU worker in batch-invariant mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.model_executor.layers.fused_moe.router import cpu_router
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.worker.cpu_worker import CPUWorker

from ...batch_invariant import batch_invariant_mode
from . import layers
from .sampler import TokenSampler
from .seeds import unread_prompts_draw_nothing
from .settings import autocast_dtype, records_routing


class BatchInvariantWorker(CPUWorker):
    """Runs the model and the sampler in batch-invariant mode, with autocast if the settings request it."""

    def init_device(self) -> None:
        """Raises ValueError for a logits processor that changes logits, other than by excluding tokens."""
        super().init_device()
        runner = self.model_runner
        for processor in runner.input_batch.logitsprocs.argmax_invariant:
            if not isinstance(processor, MinPLogitsProcessor):
                raise ValueError(
                    f"MINIRL_BATCH_INVARIANT is 1, and logits_processors has a {type(processor).__name__}: it must not "
                    "have one that is_argmax_invariant"
                )
        runner.sampler = TokenSampler(runner.sampler.logprobs_mode, runner.sampler.use_fp64_gumbel)

    def execute_model(self, scheduler_output):
        with self._in_mode():
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output):
        with self._in_mode(), unread_prompts_draw_nothing(self.model_runner):
            return super().sample_tokens(grammar_output)

    @contextmanager
    def _in_mode(self) -> Iterator[None]:
        dtype = autocast_dtype(self.vllm_config)
        # set at every step: vLLM has no registry for it, and engines of one process may need different functions
        recorded = records_routing(self.vllm_config)
        cpu_router._softmax_topk = layers.recorded_topk if recorded else layers.softmax_topk
        with batch_invariant_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            yield
