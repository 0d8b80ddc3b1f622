"""The interfaces of the two engines of a comparison. Any class with these members can take part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..moe import RoutedExperts
from .modules import RemoteModel

TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Scores:
    """An engine's results for some responses, one entry per response, on the CPU."""

    log_probs: list[Tensor]
    """[R] float32, nats: log-probabilities of the tokens at the temperature of the comparison."""
    logits: list[Tensor] | None
    """[R, V]: the logits divided by the temperature; None if the engine returns no logits."""
    routed_experts: RoutedExperts | None = None
    """[B, L], the sequences padded on the right: the chosen experts; None if they were not recorded."""


class ScoringEngine(Protocol):
    """The training engine, pi. It scores whole sequences in one padded batch."""

    model: nn.Module | None
    """The model, for hooks on its modules. Its forward takes input_ids [B, S] and attention_mask [B, ...] like a model
    of transformers. None if there is no such module; the report then has no modules and no routing."""

    def score(
        self, prompts: TokenIds, responses: TokenIds, *, with_logits: bool, routed_experts: RoutedExperts | None = None
    ) -> Scores:
        """Score the responses in a single forward. routed_experts: [B, L], experts to replay."""


class GeneratingEngine(Protocol):
    """The inference engine, mu."""

    model: nn.Module | RemoteModel | None
    """As in ScoringEngine. A forward may continue the forward before it, with cached keys and values. It must then get
    an attention_mask of all tokens so far, or the same past_key_values or cache_params object. For a RemoteModel, the
    routing comes from Scores.routed_experts."""

    def generate(self, prompts: TokenIds, *, seed: int) -> tuple[list[list[int]], Scores]:
        """Sample one response to each prompt in one batch. Returns (responses, their scores from the decode).

        The same prompts and seed must give the same responses.
        """


class Rescored:
    """A generating engine whose scores come from a scoring engine, so that the decode itself makes no difference."""

    def __init__(self, generator: GeneratingEngine, scorer: ScoringEngine):
        self._generator, self._scorer = generator, scorer

    @property
    def model(self) -> nn.Module | None:
        return self._scorer.model

    def generate(self, prompts: TokenIds, *, seed: int) -> tuple[list[list[int]], Scores]:
        responses, _ = self._generator.generate(prompts, seed=seed)
        return responses, self._scorer.score(prompts, responses, with_logits=True)
