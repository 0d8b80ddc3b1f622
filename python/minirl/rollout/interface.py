"""What the trainer asks of an inference engine, and what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minirl_kernels import RoutedExperts

from ..config import RolloutConfig
from ..errors import MiniRLError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class EngineRequest:
    """Everything that an engine is made from."""

    config: RolloutConfig
    """Sampling settings, and the engine's own."""
    dtype: str
    """Name of the computation's dtype: "float32" or "bfloat16"."""
    pad_token_id: int
    """Fills up batches."""
    eos_token_ids: list[int]
    """Any of them ends a response."""
    records_routing: bool
    """Whether training records or replays experts, so that rollouts must have `routed_experts`."""
    batch_invariant: bool
    """Whether log-probabilities must have the same bits as in training."""
    log: Path
    """File for the output of processes that the engine starts."""


@dataclass(frozen=True)
class Rollouts:
    """Sampled responses, grouped by prompt in the order of the prompts. All tensors are on the CPU."""

    token_ids: Tensor
    """[B, L] int64: prompt, then response, padded on the right."""
    attention_mask: Tensor
    """[B, L] bool: everything but the padding."""
    response_mask: Tensor
    """[B, L] bool: the sampled tokens, the end-of-sequence token among them."""
    rollout_log_probs: Tensor
    """[B, L] float32, nats: log mu of each sampled token as the decode drew it; 0 elsewhere."""
    group_ids: Tensor
    """[B] int64: number of the prompt."""
    finish_reasons: list[FinishReason]
    """[B]: "stop" at an end-of-sequence token, "length" when cut off."""
    routed_experts: RoutedExperts | None = None
    """[B, L]: the experts of each token as it was decoded, missing where the engine saw none (the last token of each
    response, at least); none where the engine does not record them."""
    logits: list[Tensor] | None = None
    """[B] of [R, V] float32: what each token was drawn from, divided by the temperature; none where the engine does not
    keep them."""

    @classmethod
    def collate(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        log_probs: Sequence[Sequence[float]],
        finish_reasons: list[FinishReason],
        *,
        pad_token_id: int,
        routed_experts: Sequence[RoutedExperts] | None = None,
        logits: list[Tensor] | None = None,
    ) -> Rollouts:
        """Pad len(prompts) groups of len(responses) / len(prompts) responses each; routed_experts, logits: one each.

        Raises MiniRLError for groups of unequal size, and for a response with more or fewer log_probs than tokens.
        """
        if not responses or len(responses) % len(prompts):
            raise MiniRLError(
                f"the rollout engine has {len(responses)} responses to {len(prompts)} prompts: it must have as many to "
                "each of them"
            )
        group_size = len(responses) // len(prompts)
        rows, is_response, aligned = [], [], []
        for index, (response, values) in enumerate(zip(responses, log_probs, strict=True)):
            prompt = prompts[index // group_size]
            if len(values) != len(response):
                raise MiniRLError(
                    f"the rollout engine has {len(values)} log-probabilities for response {index % group_size} to "
                    f"prompt {index // group_size}: it must have {len(response)}, one for each token"
                )
            rows.append(torch.tensor([*prompt, *response]))
            is_response.append(torch.tensor([False] * len(prompt) + [True] * len(response)))
            aligned.append(torch.tensor([0.0] * len(prompt) + list(values)))
        lengths = torch.tensor([len(row) for row in rows])
        token_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        return cls(
            token_ids=token_ids,
            attention_mask=torch.arange(token_ids.shape[1]) < lengths[:, None],
            response_mask=pad_sequence(is_response, batch_first=True),
            rollout_log_probs=pad_sequence(aligned, batch_first=True),
            group_ids=torch.arange(len(responses)) // group_size,
            finish_reasons=finish_reasons,
            routed_experts=(None if routed_experts is None else RoutedExperts.pad(routed_experts, token_ids.shape[1])),
            logits=logits,
        )

    def responses(self) -> list[list[int]]:
        """The sampled token ids of each response."""
        return [ids[mask].tolist() for ids, mask in zip(self.token_ids, self.response_mask, strict=True)]


class RolloutEngine(Protocol):
    """Samples with temperature alone, and reports the log-probabilities that it sampled with."""

    def update_weights(self, model: nn.Module) -> None:
        """Sample from the weights that `model` has now. Called before the first `generate` and after each step."""

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, seed: int) -> Rollouts:
        """n responses to each prompt (token ids, none empty); the same seed and weights give the same ones."""

    def close(self) -> None:
        """End what it has started. Nothing is asked of it any more."""
