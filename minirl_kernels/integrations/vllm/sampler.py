"""vLLM's sampler with log-probabilities by token_logprobs, so that they have the same bits as in training.

vLLM computes log-probabilities of the whole vocabulary and then selects some. This sampler passes on the logits and the
temperature instead, and computes only the selected log-probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler

from ...ops.token_logprobs import token_logprobs


class Scores(NamedTuple):
    """Takes the place of a tensor of log-probabilities [B, V]."""

    logits: Tensor
    """[B, V] float32, not divided by the temperature; -inf for a token that top-k or top-p excluded."""
    temperature: Tensor
    """[B] float32"""

    def of(self, token_ids: Tensor) -> Tensor:
        """Log-probabilities [B, K] float32, nats, of ids [B, K]."""
        rows = self.logits[:, None].expand(-1, token_ids.shape[1], -1)
        return token_logprobs(rows, token_ids, temperature=self.temperature[:, None].expand(token_ids.shape))


class TokenSampler(Sampler):
    def __init__(self, logprobs_mode: str, use_fp64_gumbel: bool):
        super().__init__(logprobs_mode, use_fp64_gumbel)
        if logprobs_mode == "processed_logprobs":  # the processed logits show which tokens top-k and top-p keep
            self.topk_topp_sampler = TopKTopPSampler("processed_logits", use_fp64_gumbel)

    @staticmethod
    def compute_logprobs(logits: Tensor) -> Scores:
        # a copy, since vLLM changes the logits in place
        return Scores(logits.float().clone(), logits.new_ones(len(logits), dtype=torch.float32))

    def sample(
        self, logits: Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: str | None = None
    ) -> tuple[Tensor, Scores | Tensor | None]:
        if self.logprobs_mode != "processed_logprobs" or sampling_metadata.all_greedy:
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        undivided = logits.clone()
        sampled, processed = super().sample(logits, sampling_metadata, logprobs_mode_override)
        # a temperature near 0 means greedy sampling; vLLM then divides by 1
        temperature = sampling_metadata.temperature
        temperature = torch.where(temperature < _SAMPLING_EPS, 1.0, temperature)
        return sampled, Scores(undivided.masked_fill_(processed == -torch.inf, -torch.inf), temperature)

    @staticmethod
    def gather_logprobs(logprobs: Scores | Tensor, num_logprobs: int, token_ids: Tensor) -> LogprobsTensors:
        if isinstance(logprobs, Tensor):
            return Sampler.gather_logprobs(logprobs, num_logprobs, token_ids)
        found = Sampler.gather_logprobs(logprobs.logits, num_logprobs, token_ids)
        return found._replace(logprobs=logprobs.of(found.logprob_token_ids))

    def gather_specific_token_logprobs(
        self, logprobs: Scores | Tensor, logprob_token_ids: dict[int, list[int]], sampled: Tensor
    ) -> LogprobsTensors:
        if isinstance(logprobs, Tensor):
            return super().gather_specific_token_logprobs(logprobs, logprob_token_ids, sampled)
        found = super().gather_specific_token_logprobs(logprobs.logits, logprob_token_ids, sampled)
        values = logprobs.of(found.logprob_token_ids)
        return found._replace(logprobs=values.masked_fill(found.logprobs == -torch.inf, -torch.inf))
