"""The global step of MiniRL: sample, grade, recompute old_log_probs, and make N updates. Each has its own responses."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from minirl_kernels import (
    PolicyLossInputs,
    PolicyLossMetrics,
    RoutedExperts,
    group_advantages,
    record_routing,
    replay_routing,
)
from minirl_kernels.moe.replay import RoutingReplay

from .batch import Batch
from .config import TrainConfig
from .errors import MiniRLError
from .models import autocast
from .routing import Agreement
from .sampling import Sampler
from .seeds import derive_seed
from .tasks import ProblemStream


@dataclass(frozen=True)
class Update:
    """The loss, gradient norm and metrics of one optimizer update."""

    loss: float
    grad_norm: float
    metrics: PolicyLossMetrics
    routing_agreement: Agreement


class Trainer:
    """The policy, its optimizer, and the step that improves it."""

    def __init__(self, config: TrainConfig, model: PreTrainedModel, sampler: Sampler):
        self.config, self.model, self.sampler = config, model, sampler
        self.problems = ProblemStream(sampler.task.train, config.seed, "train")
        self.reference = copy.deepcopy(model) if config.policy_loss.kl_coef else None
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )

    def step(self, number: int) -> dict[str, float]:
        """Run global step `number`, counted from 1. The caller then gives the new weights to the engine.

        Returns the metrics by name. Raises MiniRLError if training diverges or the engine fails.
        """
        seconds: dict[str, float] = {}
        with _timed(seconds, "seconds_rollout"):
            batch, metrics = self.collect(number)
        with _timed(seconds, "seconds_old_log_probs"):
            batch, routing_metrics = self.with_old_log_probs(batch)
        with _timed(seconds, "seconds_update"):
            updates = [self.update(minibatch) for minibatch in batch.split(self.config.minibatch_size)]
        return {
            **metrics,
            "loss": sum(update.loss for update in updates) / len(updates),
            "grad_norm": sum(update.grad_norm for update in updates) / len(updates),
            **reduce(add, [update.metrics for update in updates]).compute(),
            **routing_metrics,
            **sum((update.routing_agreement for update in updates), Agreement()).compute("routing_agreement"),
            **seconds,
        }

    def collect(self, number: int) -> tuple[Batch, dict[str, float]]:
        """The responses of a global step with their advantages, and the metrics of the responses."""
        count = self.config.num_minibatches * self.config.prompts_per_minibatch
        problems = self.problems.take((number - 1) * count, count)
        rollouts, rewards = self.sampler.sample(
            problems, self.config.rollout.group_size, seed=derive_seed(self.config.seed, "rollout", number)
        )
        if self.config.routing_replay != "R3":
            rollouts = replace(rollouts, routed_experts=None)
        advantages = group_advantages(rewards, rollouts.group_ids, norm_by_std=self.config.advantages_by_std)
        groups = rewards.view(count, -1)
        metrics = {
            "reward_train": rewards.mean().item(),
            "groups_with_signal": (groups != groups[:, :1]).any(1).float().mean().item(),
            "response_length": rollouts.response_mask.sum(1).float().mean().item(),
            "cut_off_fraction": rollouts.finish_reasons.count("length") / len(rollouts.finish_reasons),
        }
        return Batch.from_rollouts(rollouts, advantages), metrics

    @torch.no_grad()
    def with_old_log_probs(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """(`batch` with log pi_old, log pi_ref and the experts to replay, the metrics of its routing).

        The micro-batches are the same as in the updates. So the first update computes the same bits, and its log r is
        0. Raises MiniRLError if a log-probability is not finite.
        """
        length = batch.token_ids.shape[1]
        old_log_probs, routed_experts, agreement = [], [], Agreement()
        for micro in self._micro_batches(batch):
            recording = record_routing(self.model) if self.config.routing_replay == "R2" else nullcontext()
            with recording as record, self._replaying(micro) as replay:
                log_probs = self._forward(self.model, micro).log_probs
            old_log_probs.append(pad(log_probs.cpu(), (0, length - log_probs.shape[1])))
            agreement += Agreement.of(replay, micro)
            if record is not None:
                experts = record.sequences(len(micro)).to("cpu")
                routed_experts += [experts[row] for row in range(len(micro))]
        metrics = agreement.compute("routing_agreement_old")
        if batch.routed_experts is not None:
            metrics["routing_missing_tokens"] = float(batch.routed_experts.num_missing(batch.loss_mask))
        if routed_experts:
            batch = replace(batch, routed_experts=RoutedExperts.pad(routed_experts, length))
        ref_log_probs = None if self.reference is None else self._ref_log_probs(batch)
        batch = replace(batch, old_log_probs=torch.cat(old_log_probs), ref_log_probs=ref_log_probs)
        for name in ("old_log_probs", "ref_log_probs"):
            self._check_finite(name, batch)
        return batch, metrics

    def _check_finite(self, name: str, batch: Batch) -> None:
        """Raises MiniRLError that names the first value that is not finite. A NaN would silently disable clipping."""
        values = getattr(batch, name)
        if values is None or not bool((wrong := batch.loss_mask & ~values.isfinite()).any()):
            return
        row, position = wrong.nonzero()[0].tolist()
        prompt, response = divmod(row, self.config.rollout.group_size)
        raise MiniRLError(
            f"{name} is {float(values[row, position])} at token {position + 1} of response {response} to prompt "
            f"{prompt} of this step: it must be finite; if the model has diverged, try a smaller optimizer.lr"
        )

    def _ref_log_probs(self, batch: Batch) -> Tensor:
        parts = [self._forward(self.reference, micro).log_probs.cpu() for micro in self._micro_batches(batch)]
        return torch.cat([pad(part, (0, batch.token_ids.shape[1] - part.shape[1])) for part in parts])

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        for minibatch in batch.split(self.config.minibatch_size):
            yield from minibatch.micro_batches(self.config.micro_batch_size, self.model.device)

    def _replaying(self, micro: Batch) -> AbstractContextManager[RoutingReplay | None]:
        """Replays the experts of `micro`, if it has any, during one forward of the policy and its backward."""
        return nullcontext() if micro.routed_experts is None else replay_routing(self.model, micro.routed_experts)

    def update(self, minibatch: Batch) -> Update:
        """One optimizer update from a mini-batch of whole groups, in micro-batches.

        Raises MiniRLError if the loss overflows, naming the token, or if the gradient norm is not finite.
        """
        with _loss_errors(first=0):
            parts = self._loss_inputs(minibatch).split(self.config.micro_batch_size)
        outputs, agreement = [], Agreement()
        micro_batches = minibatch.micro_batches(self.config.micro_batch_size, self.model.device)
        for number, (micro, part) in enumerate(zip(micro_batches, parts, strict=True)):
            inputs = part.shorten(micro.token_ids.shape[1]).to(self.model.device)
            with self._replaying(micro) as replay:
                with _loss_errors(first=number * self.config.micro_batch_size):
                    output = self._forward(self.model, micro, policy_loss={"inputs": inputs}).policy_loss
                output.loss.backward()
            outputs.append(output)
            agreement += Agreement.of(replay, micro)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm).item()
        if not math.isfinite(grad_norm):
            raise MiniRLError(f"the gradient norm is {grad_norm}: it must be finite; try a smaller optimizer.lr")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Update(
            loss=sum(output.loss.item() for output in outputs),
            grad_norm=grad_norm,
            metrics=reduce(add, [output.metrics for output in outputs]),
            routing_agreement=agreement,
        )

    def _loss_inputs(self, minibatch: Batch) -> PolicyLossInputs:
        """All inputs of the loss but the log-probabilities. A token's weight depends on the whole mini-batch."""
        return PolicyLossInputs.prepare(
            minibatch.token_ids,
            old_log_probs=minibatch.old_log_probs,
            rollout_log_probs=minibatch.rollout_log_probs,
            ref_log_probs=minibatch.ref_log_probs,
            advantages=minibatch.advantages,
            loss_mask=minibatch.loss_mask,
            group_ids=minibatch.group_ids,
            config=self.config.policy_loss,
        )

    def _forward(self, model: PreTrainedModel, batch: Batch, policy_loss: dict | None = None) -> ModelOutput:
        """Log-probabilities of the batch's tokens, and their loss if `policy_loss` has its inputs; no logits."""
        with autocast(model.device, self.config.dtype):
            return model(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
                token_ids=batch.token_ids,
                temperature=self.config.rollout.temperature,
                policy_loss=policy_loss,
            )


@contextmanager
def _loss_errors(first: int) -> Iterator[None]:
    """Turns a ValueError of the loss into a MiniRLError. `first`: the first response that the loss covers."""
    try:
        yield
    except ValueError as error:
        raise MiniRLError(
            f"an update cannot be computed: {error} (responses of this mini-batch from {first} on); if the model has "
            "diverged, try a smaller optimizer.lr"
        ) from error


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
