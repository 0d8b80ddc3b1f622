"""Two engines on the same responses, batch by batch: sampled by mu, scored by pi."""

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
_OPAQUE = "an engine has no model to look into"
_UNSAID = "mu has no model to look into here, and gave no routed_experts"


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
    """Sample a response to each prompt with mu, score it with pi, and say how far they are apart.

    prompts: token ids, none empty. updated: pi_theta, for the staleness r = pi_theta / pi_old; None means pi itself.
    seed: of the samples. batch_size: responses at a time; their logits are kept, twice R V of 4 bytes for each.
    trace_sequences: the first so many of the first batch are compared module by module, and what mu's modules made of
        them is kept; 0 traces nothing. Where modules differ, the first batch runs again, for the operation.
    config: bounds and threshold of the shares of tokens that would be masked and truncated.
    routing_replay: "R3": pi and pi_theta replay the experts that mu records; "R2": pi_theta those that pi records. What
        is told of routers is what they would choose by themselves.
    progress: called with the number of responses done.
    Raises ValueError for prompts that are none, or one without tokens, for sizes below 1, and where an engine does not
    record what is to be replayed.
    """
    _check(prompts, batch_size, trace_sequences)
    routing, routing_missing = _routing(mu, pi)
    modules, modules_missing = None, None
    if not trace_sequences:
        modules_missing = "no sequences were to be traced (trace_sequences is 0)"
    elif mu.model is None or pi.model is None:
        modules_missing = _OPAQUE
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
            routing, routing_missing = None, _UNSAID
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
        return None, _OPAQUE
    try:
        return RoutingComparison(mu.model if isinstance(mu.model, nn.Module) else None, pi.model), None
    except ValueError as error:
        return None, str(error)


def _enter(stack: ExitStack, *contexts: AbstractContextManager | None) -> None:
    for context in contexts:
        stack.enter_context(context or nullcontext())


def _forwards(model: object) -> AbstractContextManager[Forwards | None]:
    """None of a model that runs elsewhere: its own record says which token is where."""
    return watched(model, names=()) if isinstance(model, nn.Module) else nullcontext()


def _misplaced(engine: str, forwards: Forwards | None, sequences: list[list[int]]) -> str | None:
    """Why the engine's forwards cannot be compared with the other's, or None."""
    found = None if forwards is None else forwards.misplaced(sequences)
    return None if found is None else f"a forward of {engine} {found}"


def _decoded(prompts: TokenIds, responses: TokenIds) -> Tensor:
    """[rows, 2], the places of all tokens but the last, which was sampled and never decoded."""
    return torch.tensor([[0, len(p) + len(r) - 1] for p, r in zip(prompts, responses, strict=True)])


def _scoring(prompts: TokenIds, responses: TokenIds) -> Tensor:
    """[rows, 2], the places whose logits a token was sampled from."""
    return torch.tensor([[len(p) - 1, len(p) + len(r) - 1] for p, r in zip(prompts, responses, strict=True)])


def _recorded(engine: str, scores: Scores) -> RoutedExperts:
    if scores.routed_experts is None:
        raise ValueError(f"{engine} gave no routed_experts: it must record them, to be replayed")
    return scores.routed_experts


@dataclass(frozen=True)
class _FirstBatch:
    """What was traced, and what it takes to run it again."""

    mu: GeneratingEngine
    pi: ScoringEngine
    trace: ModuleTrace
    prompts: TokenIds
    responses: list[list[int]]
    seed: int
    replayed: RoutedExperts | None
    rows: int

    def report(self, sampled: Scores, scored: Scores) -> tuple[ModuleReport | None, str | None]:
        """(it, None), or (None, why there is none)."""
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
        """(module, class, before which submodule, layer)"""
        kind = type(self.pi.model.get_submodule(event.culprit)).__name__
        return event.culprit, kind, event.module if event.is_input else None, self.trace.layer(event)

    def _first_operation(self, event: Event, spans: Tensor) -> tuple[OperationDifference | None, str | None]:
        """(it, None), or (None, why there is none), from a second run."""
        if not event.culprit:
            return None, "it is in the model's own forward"
        if not isinstance(self.mu.model, nn.Module):
            return None, "the operations of another process are not recorded"
        ours = OperationTrace(event.culprit, self.trace.forward_of[event.difference.first_key], self.rows)
        theirs = OperationTrace(event.culprit, 0, self.rows)
        with ours.recording(self.mu.model):
            again, _ = self.mu.generate(self.prompts, seed=self.seed)
        if again != self.responses:
            return None, "mu sampled other responses when it ran again"
        with theirs.recording(self.pi.model):
            self.pi.score(self.prompts, self.responses, with_logits=False, routed_experts=self.replayed)
        return first_difference(ours, theirs, spans), None


def _first_in_log_probs(mu: list[Tensor], pi: list[Tensor]) -> FirstDifference | None:
    ours, theirs = torch.cat(mu)[:, None], torch.cat(pi)[:, None]
    difference = Difference.between(torch.arange(len(ours)), [ours], [theirs])
    if difference.is_none:
        return None
    missing = "what they are made of is equal in both, up to the last hidden state"
    return FirstDifference(LOG_PROBS, "head and log-softmax", None, None, difference, None, missing)
