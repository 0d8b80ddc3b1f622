"""The cold start: supervised training on reference answers, so that some sampled responses get a reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .batch import next_token_targets
from .config import TrainConfig
from .models import autocast
from .sampling import Sampler
from .seeds import derive_seed
from .tasks import Problem, ProblemStream
from .tokenizer import encode_prompt


def cold_start(config: TrainConfig, model: PreTrainedModel, sampler: Sampler) -> Iterator[tuple[int, dict[str, float]]]:
    """Train `model` in place; yields (step, metrics). Ends at cold_start.stop_at_reward or after cold_start.steps."""
    settings = config.cold_start
    problems = ProblemStream(sampler.task.train, config.seed, "cold_start")
    probes = ProblemStream(sampler.task.train, config.seed, "cold_start_check").take(0, config.eval.prompts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0, fused=True)
    for step in range(1, settings.steps + 1):
        batch = problems.take((step - 1) * settings.batch_size, settings.batch_size)
        input_ids, is_answer = answered(batch, sampler.tokenizer)
        loss = supervised_loss(model, input_ids.to(model.device), is_answer.to(model.device), config.dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss.item()}
        if step % settings.check_every == 0 or step == settings.steps:
            sampler.engine.update_weights(model)
            seed = derive_seed(config.seed, "cold_start_check", step)
            metrics["reward_train"], _ = sampler.average_at_k(probes, 1, seed=seed)
        yield step, metrics
        if metrics.get("reward_train", 0.0) >= settings.stop_at_reward:
            return


def supervised_loss(model: PreTrainedModel, input_ids: Tensor, is_answer: Tensor, dtype: str) -> Tensor:
    """Mean of -log pi in nats, over the tokens [B, L] where `is_answer` is True."""
    token_ids, loss_mask = next_token_targets(input_ids, is_answer)
    with autocast(model.device, dtype):
        # no mask is needed: a causal model does not see padding on the right
        log_probs = model(input_ids, use_cache=False, token_ids=token_ids).log_probs
    return -log_probs.sum() / loss_mask.sum()


def answered(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """(input_ids, is_answer), both [B, L] padded on the right: prompt, answer, end of sequence."""
    rows, masks = [], []
    for problem in problems:
        prompt = encode_prompt(tokenizer, problem.prompt)
        answer = [*tokenizer(problem.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt + answer))
        masks.append(torch.tensor([False] * len(prompt) + [True] * len(answer)))
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)
