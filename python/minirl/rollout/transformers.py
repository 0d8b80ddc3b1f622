"""The embedded rollout engine: `generate` of transformers with a KV cache, on the training device."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from minirl_kernels import RoutedExperts, record_routing, token_logprobs
from minirl_kernels.integrations.transformers.e4m3 import E4M3Copy

from ..config import RolloutConfig
from ..errors import MiniRLError
from ..models import autocast
from .interface import EngineRequest, Rollouts


def make_engine(request: EngineRequest) -> TransformersEngine:
    """The engine of a run. The trainer opens the batch-invariant mode around its calls."""
    return TransformersEngine(
        request.config,
        dtype=request.dtype,
        pad_token_id=request.pad_token_id,
        eos_token_ids=request.eos_token_ids,
        records_routing=request.records_routing,
    )


class TransformersEngine:
    """Samples from the training model's parameters, with a separate generation config.

    With config.quantization, it samples from a rounded copy, which `update_weights` refreshes. The training model does
    not change.

    config: sampling settings. dtype: name of the computation's dtype. pad_token_id: id for padding.
    eos_token_ids: ids that end a response. records_routing: whether rollouts have routed_experts.
    keeps_logits: whether rollouts have logits, 4 V bytes per token.
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        dtype: str,
        pad_token_id: int,
        eos_token_ids: list[int],
        records_routing: bool = False,
        keeps_logits: bool = False,
    ):
        self._config, self._dtype = config, dtype
        self._records_routing, self._keeps_logits = records_routing, keeps_logits
        self._pad_token_id, self._eos_token_ids = pad_token_id, eos_token_ids
        self._model: PreTrainedModel | None = None
        self._quantized: E4M3Copy | None = None

    @property
    def model(self) -> PreTrainedModel | None:
        """The sampling model; None before the first `update_weights`."""
        return self._model

    def update_weights(self, model: PreTrainedModel) -> None:
        if self._config.quantization is not None:
            if self._quantized is None or self._quantized.source is not model:
                try:
                    self._quantized = E4M3Copy(model)
                except ValueError as error:
                    raise MiniRLError(f"rollout.quantization is 'e4m3': it must be none, as {error}") from None
            self._quantized.refresh()
            model = self._quantized.model
        self._model = copy.copy(model)
        # generate takes missing settings, such as penalties and filters, from the model's generation config
        self._model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, seed: int) -> Rollouts:
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        prompts_at_once = max(1, self._config.batch_size // n)
        responses, log_probs, finish_reasons, routed_experts, logits = [], [], [], [], []
        with torch.random.fork_rng(devices), torch.no_grad(), autocast(self._model.device, self._dtype):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), prompts_at_once):
                part = prompts[start : start + prompts_at_once]
                ids, values, routed, scores = self._decode(part, n)
                width = max(map(len, part))
                for index, (row, row_values) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
                    length, finish_reason = self._end(row)
                    if routed is not None:
                        # the last token was sampled but never decoded
                        routed_experts.append(routed[index, width - len(part[index // n]) : width + length - 1])
                    if scores is not None:
                        logits.append(scores[index, :length])
                    responses.append(row[:length])
                    log_probs.append(row_values[:length])
                    finish_reasons.append(finish_reason)
        return Rollouts.collate(
            prompts,
            responses,
            log_probs,
            finish_reasons,
            pad_token_id=self._pad_token_id,
            routed_experts=routed_experts or None,
            logits=logits or None,
        )

    def close(self) -> None:
        """Nothing to close."""

    def _decode(
        self, prompts: Sequence[Sequence[int]], n: int
    ) -> tuple[Tensor, Tensor, RoutedExperts | None, Tensor | None]:
        """Sample n responses to each prompt. Values after the end of a response are undefined.

        Returns (token ids [B, R], log-probabilities [B, R], routed_experts [B, P + R - 1], logits [B, R, V]). Prompts
        are padded on the left to P tokens.
        """
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        device = self._model.device
        token_ids = torch.tensor(
            [[self._pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)],
            device=device,
        )
        attention_mask = torch.arange(width, device=device) >= torch.tensor(padding, device=device)[:, None]
        sampled = SampledLogProbs(self._config.temperature, keeps_logits=self._keeps_logits)
        with record_routing(self._model) if self._records_routing else nullcontext() as record:
            sequences = self._model.generate(
                token_ids,
                attention_mask=attention_mask.long(),
                logits_processor=LogitsProcessorList([sampled]),
                generation_config=GenerationConfig(
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=n,
                    max_new_tokens=self._config.max_new_tokens,
                    pad_token_id=self._pad_token_id,
                    eos_token_id=self._eos_token_ids,
                ),
            )
        responses = sequences[:, width:]
        routed_experts = None if record is None else record.sequences(len(sequences)).to("cpu")
        log_probs = sampled.of(responses)
        return responses, log_probs, routed_experts, sampled.logits(responses.shape[1])

    def _end(self, response: list[int]) -> tuple[int, str]:
        """(number of tokens in a decoded row up to its end, finish reason)."""
        for place, token in enumerate(response):
            if token in self._eos_token_ids:
                return place + 1, "stop"
        return len(response), "length"


class SampledLogProbs(LogitsProcessor):
    """Divides the logits by the temperature, and records the log-probability of each drawn token.

    It stores a single [B, V] of logits, unless keeps_logits. `output_logits` of `generate` would store one per token.
    """

    def __init__(self, temperature: float, *, keeps_logits: bool = False):
        self._temperature = temperature
        self._logits: Tensor | None = None
        self._kept: list[Tensor] | None = [] if keeps_logits else None
        self._log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._logits is not None:
            self._note(input_ids[:, -1])
        self._logits = scores
        scores = scores / self._temperature
        if self._kept is not None:
            self._kept.append(scores.cpu())
        return scores

    def of(self, responses: Tensor) -> Tensor:
        """Log-probabilities [B, R] float32 of the decoded tokens [B, R]. Call it once, after `generate`."""
        if len(self._log_probs) < responses.shape[1]:
            self._note(responses[:, -1])
        return torch.stack(self._log_probs[: responses.shape[1]], 1)

    def logits(self, length: int) -> Tensor | None:
        """Logits [B, length, V] float32 on the CPU, divided by the temperature; None unless keeps_logits."""
        return None if self._kept is None else torch.stack(self._kept[:length], 1)

    def _note(self, drawn: Tensor) -> None:
        # the temperature is applied inside token_logprobs, as in training, for the same bits
        self._log_probs.append(token_logprobs(self._logits, drawn, temperature=self._temperature))
