"""compare_engines: mu samples responses, pi scores the same responses, and a report describes the differences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import PolicyLossConfig
from ..moe import RoutedExperts
from .engines import GeneratingEngine, Scores, ScoringEngine, TokenIds
from .forwards import Forwards, watched
from .modules import Difference, Event, ModuleTrace
from .operations import OperationDifference, OperationTrace, first_difference
from .probabilities import full_vocabulary_kl, sampled_token_metrics
from .report import LOG_PROBS, DiscrepancyReport, FirstDifference, Jump, ModuleReport
from .routing import RoutingComparison

RoutingReplay = Literal["disabled", "R2", "R3"]
_NO_MODEL = "an engine gives no access to its model"
_NO_EXPERTS = "mu gives no access to its model here, and returned no routed_experts"


def compare_engines(
    mu: GeneratingEngine,
    pi: ScoringEngine,
    prompts: TokenIds,
    *,
    updated: ScoringEngine | None = None,
    seed: int = 0,
    batch_size: int = 32,
    trace_sequences: int = 4,
    config: PolicyLossConfig = PolicyLossConfig(),
    routing_replay: RoutingReplay = "disabled",
    progress: Callable[[int], None] = lambda done: None,
) -> DiscrepancyReport:
    """Sample a response to each prompt with mu, score it with pi, and report the differences.

    prompts: token ids of each prompt, at least one token each.
    updated: pi_theta, for the staleness r = pi_theta / pi_old; None means pi_theta = pi_old.
    seed: of the samples. batch_size: responses per batch. The logits of both engines are kept for a batch: 2 R V
        float32 values for a response of R tokens.
    trace_sequences: number of sequences in the first batch that are compared module by module; 0 means none. All
        module outputs of mu are kept for them. If a module differs, the batch runs again to find the operation.
    config: clip bounds and truncation threshold, for the fractions of tokens that would be masked or truncated.
    routing_replay: "R3": pi and pi_theta replay the experts that mu recorded. "R2": pi_theta replays the experts that
        pi recorded. The routing section of the report always compares the natural choices of the routers.
    progress: called with the number of responses done.

    Raises ValueError for no prompts, a prompt without tokens, sizes below 1, and an engine that does not record the
    experts to be replayed.
    """
    _check(prompts, batch_size, trace_sequences)
    routing, routing_missing = _routing(mu, pi)
    modules, modules_missing = None, None
    if not trace_sequences:
        modules_missing = "no sequences were to be traced (trace_sequences is 0)"
    elif mu.model is None or pi.model is None:
        modules_missing = _NO_MODEL
    mu_scores, pi_scores, updated_scores, full_kl = [], [], [], []
    for start in range(0, len(prompts), batch_size):
        part, part_seed = prompts[start : start + batch_size], seed + start
        rows = min(trace_sequences, len(part))
        trace = ModuleTrace(rows) if modules_missing is None and start == 0 else None
        with ExitStack() as watching:
            forwards = watching.enter_context(_forwards(mu.model))
            _enter(watching, routing and routing.recording_mu(), trace and trace.recording(mu.model))
            responses, sampled = mu.generate(part, seed=part_seed)
        sequences = [[*prompt, *response] for prompt, response in zip(part, responses, strict=True)]
        misplaced = _misplaced("mu", forwards, sequences)
        if routing is not None and not routing.watches_mu and sampled.routed_experts is None:
            routing, routing_missing = None, _NO_EXPERTS
        with ExitStack() as watching:
            forwards = watching.enter_context(_forwards(pi.model))
            _enter(
                watching,
                routing and routing.recording_pi(),
                trace and trace.comparing(pi.model, _decoded(part[:rows], responses[:rows])),
            )
            replayed = _recorded("mu", sampled) if routing_replay == "R3" else None
            with_logits = sampled.logits is not None
            scored = pi.score(part, responses, with_logits=with_logits, routed_experts=replayed)
        misplaced = misplaced or _misplaced("pi", forwards, sequences)
        if misplaced is not None and routing is not None:
            routing, routing_missing = None, misplaced
        if misplaced is not None and trace is not None:
            trace, modules_missing = None, misplaced
        if routing is not None:
            routing.add(_scoring(part, responses), sampled.routed_experts)
        if trace is not None:
            first_batch = _FirstBatch(mu, pi, trace, part, responses, part_seed, replayed, rows)
            modules, modules_missing = first_batch.report(sampled, scored)
        if updated is not None:
            experts = _recorded("pi", scored) if routing_replay == "R2" else replayed
            scores = updated.score(part, responses, with_logits=False, routed_experts=experts)
            updated_scores += scores.log_probs
        if sampled.logits is not None and scored.logits is not None:
            full_kl += map(full_vocabulary_kl, sampled.logits, scored.logits)
        mu_scores += sampled.log_probs
        pi_scores += scored.log_probs
        progress(start + len(part))
    kl = torch.cat(full_kl) if full_kl else None
    return DiscrepancyReport(
        metrics=sampled_token_metrics(mu_scores, pi_scores, updated_scores or None, config),
        has_update=updated is not None,
        full_kl_mean=None if kl is None else kl.mean().item(),
        full_kl_max=None if kl is None else kl.max().item(),
        routing=None if routing is None else routing.layers(),
        routing_missing=routing_missing,
        modules=modules,
        modules_missing=modules_missing,
        log_d=torch.cat(pi_scores).double() - torch.cat(mu_scores).double(),
    )


def _check(prompts: TokenIds, batch_size: int, trace_sequences: int) -> None:
    if not prompts:
        raise ValueError("prompts is empty: it must hold at least one")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{number}] is empty: it must have at least one token")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")
    if trace_sequences < 0:
        raise ValueError(f"trace_sequences is {trace_sequences}: it must be at least 0")


def _routing(mu: GeneratingEngine, pi: ScoringEngine) -> tuple[RoutingComparison | None, str | None]:
    if pi.model is None:
        return None, _NO_MODEL
    try:
        return RoutingComparison(mu.model if isinstance(mu.model, nn.Module) else None, pi.model), None
    except ValueError as error:
        return None, str(error)


def _enter(stack: ExitStack, *contexts: AbstractContextManager | None) -> None:
    for context in contexts:
        stack.enter_context(context or nullcontext())


def _forwards(model: object) -> AbstractContextManager[Forwards | None]:
    """Watches the forwards of a model in this process. A model in another process records the places itself: None."""
    return watched(model, names=()) if isinstance(model, nn.Module) else nullcontext()


def _misplaced(engine: str, forwards: Forwards | None, sequences: list[list[int]]) -> str | None:
    """The reason why the forwards cannot be aligned with the sequences; None if they can."""
    found = None if forwards is None else forwards.misplaced(sequences)
    return None if found is None else f"a forward of {engine} {found}"


def _decoded(prompts: TokenIds, responses: TokenIds) -> Tensor:
    """[rows, 2]: start and end of the decoded tokens. The last token was sampled but never decoded."""
    return torch.tensor([[0, len(p) + len(r) - 1] for p, r in zip(prompts, responses, strict=True)])


def _scoring(prompts: TokenIds, responses: TokenIds) -> Tensor:
    """[rows, 2]: start and end of the positions whose logits produced the sampled tokens."""
    return torch.tensor([[len(p) - 1, len(p) + len(r) - 1] for p, r in zip(prompts, responses, strict=True)])


def _recorded(engine: str, scores: Scores) -> RoutedExperts:
    if scores.routed_experts is None:
        raise ValueError(f"{engine} gave no routed_experts: it must record them for a replay")
    return scores.routed_experts


@dataclass(frozen=True)
class _FirstBatch:
    """The trace of the first batch, with everything needed to run this batch again."""

    mu: GeneratingEngine
    pi: ScoringEngine
    trace: ModuleTrace
    prompts: TokenIds
    responses: list[list[int]]
    seed: int
    replayed: RoutedExperts | None
    rows: int

    def report(self, sampled: Scores, scored: Scores) -> tuple[ModuleReport | None, str | None]:
        """(report, None), or (None, the reason for its absence)."""
        if not self.trace.events:
            return None, "the engines have no modules in common"
        spans = _decoded(self.prompts[: self.rows], self.responses[: self.rows])
        event = self.trace.first()
        if event is None:
            first = _first_in_log_probs(sampled.log_probs[: self.rows], scored.log_probs[: self.rows])
        else:
            operation = self._first_operation(event, spans)
            first = FirstDifference(*self._place_of(event), event.difference, *operation)
        jump = self.trace.jump()
        report = ModuleReport(
            sequences=self.rows,
            tokens=self.trace.tokens,
            first=first,
            jump=None if jump is None else Jump(*self._place_of(jump[0]), jump[1], jump[0].difference),
            layers=[(number, event.difference) for number, event in self.trace.layers()],
            modules=self.trace.outputs(),
        )
        return report, None

    def _place_of(self, event: Event) -> tuple[str, str, str | None, int | None]:
        """(module, class, submodule that receives the input or None, layer), the fields of FirstDifference and Jump."""
        kind = type(self.pi.model.get_submodule(event.culprit)).__name__
        return event.culprit, kind, event.module if event.is_input else None, self.trace.layer(event)

    def _first_operation(self, event: Event, spans: Tensor) -> tuple[OperationDifference | None, str | None]:
        """(first operation that differs, None), or (None, the reason for its absence); runs the batch again."""
        if not event.culprit:
            return None, "the difference arises in the model's own forward"
        if not isinstance(self.mu.model, nn.Module):
            return None, "operations in another process are not recorded"
        mu_trace = OperationTrace(event.culprit, self.trace.forward_of[event.difference.first_key], self.rows)
        pi_trace = OperationTrace(event.culprit, 0, self.rows)
        with mu_trace.recording(self.mu.model):
            again, _ = self.mu.generate(self.prompts, seed=self.seed)
        if again != self.responses:
            return None, "mu sampled different responses in a second run"
        with pi_trace.recording(self.pi.model):
            self.pi.score(self.prompts, self.responses, with_logits=False, routed_experts=self.replayed)
        return first_difference(mu_trace, pi_trace, spans), None


def _first_in_log_probs(mu: list[Tensor], pi: list[Tensor]) -> FirstDifference | None:
    mu_values, pi_values = torch.cat(mu)[:, None], torch.cat(pi)[:, None]
    difference = Difference.between(torch.arange(len(mu_values)), [mu_values], [pi_values])
    if difference.is_none:
        return None
    missing = "all modules up to the last hidden states are equal"
    return FirstDifference(LOG_PROBS, "head and log-softmax", None, None, difference, None, missing)
