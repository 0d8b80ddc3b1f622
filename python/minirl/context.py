"""Finds a model's context length, and checks that prompts and responses fit into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .config import TrainConfig
from .errors import MiniRLError
from .tasks import Problem
from .tokenizer import encode_prompt

_EXTENDING = ("linear", "dynamic", "yarn")  # kinds of rotary scaling whose factor multiplies the length


def context_length(config: PreTrainedConfig) -> int | None:
    """Maximum number of tokens in a sequence, from the model's config; None if the config has no limit.

    The limit is max_position_embeddings (max_seq_len in MPT), multiplied by the factor of rotary scaling.
    """
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if length is None or length < 1:
        return None
    return max([length, *_extended(getattr(text, "rope_parameters", None) or {}, length)])


def _extended(rope: dict, length: int) -> Iterable[int]:
    """The extended length of each rotary scaling. rope: its parameters, or a table of parameters per layer kind."""
    for value in rope.values():
        if isinstance(value, dict):
            yield from _extended(value, length)
    if rope.get("rope_type") in _EXTENDING:
        yield int(rope["factor"] * rope.get("original_max_position_embeddings", length))


def check_fits(model: PreTrainedModel, longest_prompt: int, max_new_tokens: int, option: str) -> None:
    """Raises MiniRLError unless a prompt and a response of these lengths fit into the model's context.

    option: the user's name of max_new_tokens, for the message.
    """
    limit = context_length(model.config)
    if limit is not None:
        _check_fits(
            limit, f"the context of this {model.config.model_type} model", longest_prompt, max_new_tokens, option
        )


def _check_fits(limit: int, name: str, longest_prompt: int, max_new_tokens: int, option: str) -> None:
    together = longest_prompt + max_new_tokens
    if together > limit:
        raise MiniRLError(
            f"{option} is {max_new_tokens} and the longest prompt has {longest_prompt} tokens, together {together}: "
            f"they must be at most {limit}, {name}"
        )


def check_problems(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    *,
    with_answers: bool = False,
) -> None:
    """Raises MiniRLError unless each problem of a run, with the longest response, fits into the model's context.

    with_answers: each problem must also fit with its reference answer, for the cold start.
    """
    if not problems:
        raise MiniRLError(
            f"task.held_out_fraction is {config.task.held_out_fraction}, which leaves no problems on one side: it must "
            "be another value, or the task must have more problems"
        )
    lengths = [len(encode_prompt(tokenizer, problem.prompt)) for problem in problems]
    longest, most = max(lengths), config.rollout.max_new_tokens
    check_fits(model, longest, most, "rollout.max_new_tokens")
    vllm_limit = config.rollout.vllm.args.get("max_model_len") if config.rollout.engine == "vllm" else None
    if isinstance(vllm_limit, int):  # vLLM raises an error for other types
        _check_fits(vllm_limit, "rollout.vllm.args.max_model_len", longest, most, "rollout.max_new_tokens")
    limit = context_length(model.config)
    if with_answers and limit is not None:
        answer_length = cache(lambda answer: len(tokenizer(answer, add_special_tokens=False).input_ids))
        read = max(
            length + answer_length(problem.answer) + 1 for length, problem in zip(lengths, problems, strict=True)
        )
        if read > limit:
            raise MiniRLError(
                f"the longest problem has {read} tokens with its answer and the end of sequence: they must be at most "
                f"{limit}, the context of this {model.config.model_type} model, or cold_start.steps must be 0"
            )
