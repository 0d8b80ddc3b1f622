"""The embedded engine: transformers' `generate`, with a KV cache, on the training process's own device."""

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
    """Samples from a view of the training model: the same parameters, another generation config.

    With config.quantization they are those of a copy, which `update_weights` refreshes; the training model stays as
    it is.

    config: sampling settings. dtype: name of the computation's dtype. pad_token_id: fills up batches.
    eos_token_ids: any of them ends a response. records_routing: whether rollouts come with routed_experts.
    keeps_logits: whether they come with logits, 4 V bytes per token.
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
        """What it samples from; none before the first `update_weights`."""
        return self._model

    def update_weights(self, model: PreTrainedModel) -> None:
        if self._config.quantization is not None:
            if self._quantized is None or self._quantized.source is not model:
                try:
                    self._quantized = E4M3Copy(model)
                except ValueError as error:
                    raise MiniRLError(f"rollout.quantization is 'e4m3', and cannot be: {error}") from None
            self._quantized.refresh()
            model = self._quantized.model
        self._model = copy.copy(model)
        # generate fills in what we leave out from the model's own config: penalties, filters
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
                        # the last token was sampled, and never decoded
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
        """Nothing was started."""

    def _decode(
        self, prompts: Sequence[Sequence[int]], n: int
    ) -> tuple[Tensor, Tensor, RoutedExperts | None, Tensor | None]:
        """n responses to each prompt, with garbage after their ends.

        [B, R] token ids and log-probabilities; routed_experts [B, P + R - 1] of prompts padded on the left to P tokens;
        logits [B, R, V].
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
        """(tokens of a decoded row up to its end, why it ended)."""
        for place, token in enumerate(response):
            if token in self._eos_token_ids:
                return place + 1, "stop"
        return len(response), "length"


class SampledLogProbs(LogitsProcessor):
    """Divides the logits by the temperature, and notes the log-probability of the token that is then drawn.

    It keeps one [B, V] of logits, unless keeps_logits; `generate`'s own output_logits would keep one per token.
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
        """[B, R] float32 of the decoded tokens [B, R]; to be called once, after `generate`."""
        if len(self._log_probs) < responses.shape[1]:
            self._note(responses[:, -1])
        return torch.stack(self._log_probs[: responses.shape[1]], 1)

    def logits(self, length: int) -> Tensor | None:
        """[B, length, V] float32, on the CPU; none unless they were kept."""
        return None if self._kept is None else torch.stack(self._kept[:length], 1)

    def _note(self, drawn: Tensor) -> None:
        # by the temperature as in training, where it divides differences of logits
        self._log_probs.append(token_logprobs(self._logits, drawn, temperature=self._temperature))
