"""Sampled responses as the loss wants them, and their split into mini-batches and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minirl_kernels import RoutedExperts

from .rollout import Rollouts

IGNORED = -100


def next_token_targets(input_ids: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(token_ids, loss_mask): position t scores token t + 1, so that whole logits go into the loss unsliced.

    input_ids: [B, L] integers. response_mask: [B, L] bool, the tokens to be scored. Returns token_ids [B, L], -100
    where nothing is scored (the last position never scores), and loss_mask [B, L] bool.
    """
    loss_mask = shift_left(response_mask, False)
    return shift_left(input_ids, IGNORED).where(loss_mask, IGNORED), loss_mask


def shift_left(values: Tensor, fill: float) -> Tensor:
    """[B, L] -> [B, L]: what belongs to token t + 1 at position t, and `fill` at the last."""
    return torch.cat([values[:, 1:], torch.full_like(values[:, :1], fill)], 1)


@dataclass(frozen=True)
class Batch:
    """Responses in rows; per-token tensors are [B, L], where position t is about token t + 1."""

    input_ids: Tensor
    attention_mask: Tensor
    token_ids: Tensor
    loss_mask: Tensor
    rollout_log_probs: Tensor
    group_ids: Tensor  # [B]
    advantages: Tensor  # [B]
    old_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    routed_experts: RoutedExperts | None = None  # [B, L], of input_ids; those to be replayed

    @classmethod
    def from_rollouts(cls, rollouts: Rollouts, advantages: Tensor) -> Batch:
        token_ids, loss_mask = next_token_targets(rollouts.token_ids, rollouts.response_mask)
        return cls(
            input_ids=rollouts.token_ids,
            attention_mask=rollouts.attention_mask,
            token_ids=token_ids,
            loss_mask=loss_mask,
            rollout_log_probs=shift_left(rollouts.rollout_log_probs, 0.0),
            group_ids=rollouts.group_ids,
            advantages=advantages,
            routed_experts=rollouts.routed_experts,
        )

    def __len__(self) -> int:
        return len(self.input_ids)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive parts of `size` responses, the last one perhaps smaller."""
        for start in range(0, len(self), size):
            yield self._map(lambda tensor, rows=slice(start, start + size): tensor[rows])

    def micro_batches(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Parts of `size` responses on the device, each as long as its longest response."""
        for part in self.split(size):
            length = int(part.attention_mask.sum(1).max())
            yield part._map(
                lambda values, length=length: (values if _is_per_response(values) else values[:, :length]).to(device)
            )

    def _map(self, function) -> Batch:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: None if values is None else function(values) for name, values in every.items()})


def _is_per_response(values: Tensor | RoutedExperts) -> bool:
    return isinstance(values, Tensor) and values.dim() == 1
