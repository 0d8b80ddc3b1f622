"""Problems in, graded responses out: what training and evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import TrainConfig
from .errors import MiniRLError
from .models import end_token_ids
from .rollout import RolloutEngine, Rollouts, TransformersEngine
from .run_dir import RunDir
from .tasks import Problem, ProblemStream, Task
from .tokenizer import encode_prompt


class Sampler:
    """An engine, and the tokenizer and the task that give its tokens a meaning."""

    def __init__(self, engine: RolloutEngine, tokenizer: PreTrainedTokenizerBase, task: Task):
        self.engine, self.tokenizer, self.task = engine, tokenizer, task

    def sample(self, problems: Sequence[Problem], n: int, *, seed: int) -> tuple[Rollouts, Tensor]:
        """n responses to each problem, and their rewards [len(problems) * n] float32, in the same order."""
        prompts = [encode_prompt(self.tokenizer, problem.prompt) for problem in problems]
        rollouts = self.engine.generate(prompts, n, seed=seed)
        texts = self.tokenizer.batch_decode(rollouts.responses(), skip_special_tokens=True)
        rewards = [self.task.reward(problems[index // n], text) for index, text in enumerate(texts)]
        return rollouts, torch.tensor(rewards)

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
    engine = make_engine(config, model, tokenizer)
    engine.update_weights(model)
    return Sampler(engine, tokenizer, task)


def make_engine(config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    """The engine of `config`, without weights. Raises MiniRLError."""
    options = {
        "dtype": config.rollout.dtype or config.dtype,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "eos_token_ids": end_token_ids(model, tokenizer),
        # for R2 too, which does not replay them: what records breaks ties by a rule, and transformers' routers by none
        "records_routing": config.routing_replay != "disabled",
    }
    if config.rollout.engine == "transformers":
        return TransformersEngine(config.rollout, **options)
    try:
        from .rollout.vllm.engine import VLLMEngine  # here, since vLLM is not needed otherwise, and slow to import
    except ImportError as error:
        raise MiniRLError(
            f"rollout.engine is 'vllm', which cannot be imported ({error}): install it as docs/vllm.md says"
        ) from None
    log = RunDir(Path(config.run_dir)).vllm_log
    return VLLMEngine(
        config.rollout,
        **options,
        replays_routing=options["records_routing"],
        batch_invariant=config.batch_invariant,
        log=log,
    )


def held_out_problems(config: TrainConfig, task: Task, count: int) -> list[Problem]:
    """The first `count` held-out problems (all, if there are fewer) of an order that the seed fixes."""
    return ProblemStream(task.held_out, config.seed, "held_out").take(0, min(count, len(task.held_out)))
