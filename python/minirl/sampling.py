"""Samples responses to problems and grades them, for training and for evaluation."""

from __future__ import annotations

import numbers
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minirl_kernels.moe.routers import routers

from .config import TrainConfig
from .errors import MiniRLError
from .models import end_token_ids
from .rollout import Asked, EngineRequest, PolicyLimits, RolloutEngine, Rollouts, check_rollouts, make_engine
from .run_dir import RunDir
from .tasks import Problem, ProblemStream, Task, prompt_label
from .tokenizer import encode_prompt


class Sampler:
    """A rollout engine with the limits of its responses, and the tokenizer and task that grade them."""

    def __init__(self, engine: RolloutEngine, limits: PolicyLimits, tokenizer: PreTrainedTokenizerBase, task: Task):
        self.engine, self.limits, self.tokenizer, self.task = engine, limits, tokenizer, task

    def sample(self, problems: Sequence[Problem], n: int, *, seed: int) -> tuple[Rollouts, Tensor]:
        """n responses to each problem, and their rewards [len(problems) * n] float32 in the same order.

        Raises MiniRLError for rollouts that fail `check_rollouts`, and for a reward that raises an error or is not a
        finite number. The message names the response.
        """
        prompts = [encode_prompt(self.tokenizer, problem.prompt) for problem in problems]
        asked = Asked(prompts, [prompt_label(problem.prompt) for problem in problems], n)
        rollouts = self.engine.generate(prompts, n, seed=seed)
        check_rollouts(rollouts, asked, self.limits)
        texts = self.tokenizer.batch_decode(rollouts.responses(), skip_special_tokens=True)
        rewards = [self._reward(problems[row // n], text, asked.row(row)) for row, text in enumerate(texts)]
        return rollouts, torch.tensor(rewards, dtype=torch.float32)

    def _reward(self, problem: Problem, response: str, name: str) -> float:
        """The reward of a response. Raises MiniRLError, with the response's name, unless it is a finite float32."""
        about = f"the reward of {name}, whose text is {response[:60]!r}, "
        try:
            reward = self.task.reward(problem, response)
        except Exception as error:  # a task is user code and may raise any exception
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise MiniRLError(
                f"{about}cannot be computed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            ) from error
        if isinstance(reward, bool) or not isinstance(reward, numbers.Real):
            raise MiniRLError(f"{about}is {reward!r}, a {type(reward).__name__}: it must be a float")
        if not abs(reward) <= torch.finfo(torch.float32).max:
            raise MiniRLError(f"{about}is {reward}: it must be finite in float32")
        return float(reward)

    def average_at_k(self, problems: Sequence[Problem], k: int, *, seed: int) -> tuple[float, float]:
        """avg@k: (mean reward of k responses to each problem, its standard error over the problems)."""
        _, rewards = self.sample(problems, k, seed=seed)
        means = rewards.view(len(problems), k).double().mean(1)
        error = means.std().item() / len(problems) ** 0.5 if len(problems) > 1 else float("nan")
        return means.mean().item(), error


def make_sampler(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> Sampler:
    """The engine of `config`, holding the weights of `model`, with the tokenizer and the task. Raises MiniRLError."""
    engine = make_engine(engine_request(config, model, tokenizer))
    engine.update_weights(model)
    return Sampler(engine, policy_limits(config, model, tokenizer), tokenizer, task)


def policy_limits(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PolicyLimits:
    """The limits of valid responses of `model`, sampled with the settings of `config`."""
    routing = None
    if config.routing_replay != "disabled":
        found = routers(model)
        routing = (len(found), found[0].top_k, found[0].num_experts)
    return PolicyLimits(
        vocab_size=model.get_input_embeddings().num_embeddings,
        end_token_ids=frozenset(end_token_ids(model, tokenizer)),
        max_new_tokens=config.rollout.max_new_tokens,
        routing=routing,
    )


def engine_request(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EngineRequest:
    """Everything that the engine of `config` is made from, to sample from `model`."""
    return EngineRequest(
        config.rollout,
        dtype=config.rollout.dtype or config.dtype,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_token_ids=end_token_ids(model, tokenizer),
        # for R2 too, which does not replay them: what records breaks ties by a rule, and transformers' routers by none
        records_routing=config.routing_replay != "disabled",
        batch_invariant=config.batch_invariant,
        log=RunDir(Path(config.run_dir)).vllm_log,
    )


def held_out_problems(config: TrainConfig, task: Task, count: int) -> list[Problem]:
    """The first `count` held-out problems (all, if there are fewer), in an order that depends on the seed."""
    return ProblemStream(task.held_out, config.seed, "held_out").take(0, min(count, len(task.held_out)))
