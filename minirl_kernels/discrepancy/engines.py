"""What a comparison asks of its two engines. Another inference engine is a class with these members."""

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
    """What an engine says of some responses, one entry each, on the CPU."""

    log_probs: list[Tensor]
    """[R] float32, nats: of each token, at the temperature of the comparison."""
    logits: list[Tensor] | None
    """[R, V]: what the log-probabilities come from, divided by the temperature; none where the engine has none."""
    routed_experts: RoutedExperts | None = None
    """[B, L] of the sequences, padded on the right: the experts that were chosen; none where they are not recorded."""


class ScoringEngine(Protocol):
    """The training side, pi: whole sequences in one batch, padded."""

    model: nn.Module | None
    """What computes, for hooks on its modules: its forwards take input_ids [B, S] and attention_mask [B, ...] as those
    of transformers do; none where there is no such module (then nothing is said of modules and routing)."""

    def score(
        self, prompts: TokenIds, responses: TokenIds, *, with_logits: bool, routed_experts: RoutedExperts | None = None
    ) -> Scores:
        """The scores of given responses, in a single forward; routed_experts: [B, L], to be replayed."""


class GeneratingEngine(Protocol):
    """The inference side, mu."""

    model: nn.Module | RemoteModel | None
    """As in ScoringEngine; a forward continues the one before it, whose keys and values it has cached. It says so by an
    attention_mask of all tokens so far, or by the same past_key_values or cache_params. Of a model that runs elsewhere,
    the routing is that of Scores.routed_experts."""

    def generate(self, prompts: TokenIds, *, seed: int) -> tuple[list[list[int]], Scores]:
        """One response to each prompt, sampled in one batch, and its scores as the decode had them.

        The same prompts and seed give the same responses.
        """


class Rescored:
    """A generating engine whose scores are those of a scoring engine: mu without the difference that a decode makes."""

    def __init__(self, generator: GeneratingEngine, scorer: ScoringEngine):
        self._generator, self._scorer = generator, scorer

    @property
    def model(self) -> nn.Module | None:
        return self._scorer.model

    def generate(self, prompts: TokenIds, *, seed: int) -> tuple[list[list[int]], Scores]:
        responses, _ = self._generator.generate(prompts, seed=seed)
        return responses, self._scorer.score(prompts, responses, with_logits=True)
