"""Tasks: problems for training, held-out problems, and the reward of a response."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Protocol

import torch

from .config import TaskConfig
from .errors import MiniRLError
from .rewards import exact_match, read_answer
from .seeds import generator

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    """A prompt (text, or chat messages with role and content) and its reference answer."""

    prompt: Prompt
    answer: str


class Task(Protocol):
    """The interface of a task; `make_task` makes the task of a configuration."""

    train: Sequence[Problem]
    held_out: Sequence[Problem]

    def reward(self, problem: Problem, response: str) -> float:
        """The reward of a whole response, its special tokens removed."""


class ArithmeticTask:
    """Sums of two numbers from 0 to max_operand: the only right answer to "12+7=" is "19"."""

    characters = "0123456789+="

    def __init__(self, config: TaskConfig):
        numbers = range(config.max_operand + 1)
        # a + b and b + a have the same key, so both are in training or both are held out
        pairs = [(f"{min(a, b)}+{max(a, b)}", Problem(f"{a}+{b}=", str(a + b))) for a in numbers for b in numbers]
        self.train, self.held_out = split_held_out(pairs, config.held_out_fraction)

    def reward(self, problem: Problem, response: str) -> float:
        return exact_match(problem.answer, response)


class JsonlTask:
    """Prompts and answers from a file, one JSON object per line. For the grading of responses, see `read_answer`."""

    def __init__(self, config: TaskConfig):
        keyed = [(json.dumps(problem.prompt), problem) for problem in read_problems(Path(config.path))]
        self.train, self.held_out = split_held_out(keyed, config.held_out_fraction)
        prompts = len({key for key, _ in keyed})
        for name, side in (("training", self.train), ("held-out", self.held_out)):
            if not side:
                raise MiniRLError(
                    f"{config.path} leaves no {name} problems of its {len(keyed)}, which have {prompts} different "
                    "prompts (equal prompts are never on both sides): it must have more different prompts"
                    + (f", or task.held_out_fraction, {config.held_out_fraction}, another value" if prompts > 1 else "")
                )

    def reward(self, problem: Problem, response: str) -> float:
        return read_answer(problem.answer).reward(response)


def make_task(config: TaskConfig) -> Task:
    """The task of `config.kind`. Raises MiniRLError for a file that cannot be used."""
    return {"arithmetic": ArithmeticTask, "jsonl": JsonlTask}[config.kind](config)


def split_held_out(keyed: Iterable[tuple[str, Problem]], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """(training problems, held-out problems). The split depends on the keys alone, so it is the same in every run."""
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for key, problem in keyed:
        digest = hashlib.sha256(key.encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(problem)
    return sides


def read_problems(path: Path) -> list[Problem]:
    """One problem per non-blank line. Raises MiniRLError that names file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise MiniRLError(f"cannot read task.path {path}: {getattr(error, 'strerror', None) or error}") from None
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                problems.append(_parse_problem(line))
            except ValueError as error:
                raise MiniRLError(f"{path}, line {number}: {error}") from None
    return problems


def _parse_problem(line: str) -> Problem:
    try:
        record = json.loads(line, parse_float=Decimal)  # a Decimal keeps the digits of a number
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict) or not {"prompt", "answer"} <= set(record):
        raise ValueError(f"{line[:60]} must be an object with the keys prompt and answer")
    prompt, answer = record["prompt"], record["answer"]
    if not is_prompt(prompt):
        raise ValueError(f"prompt is {prompt!r}: it must be a string, or a list of messages with role and content")
    if isinstance(answer, (int, Decimal)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise ValueError(f"answer is {answer!r}: it must be a string or a number")
    if not prompt:
        raise ValueError("prompt is empty: it must have at least one character")
    try:
        read_answer(answer)
    except ValueError as error:
        raise ValueError(f"answer is {answer!r}: {error}") from None
    return Problem(prompt, answer)


def is_prompt(value: object) -> bool:
    """Whether the value is a text or a list of chat messages; either may be empty."""
    return isinstance(value, str) or (
        isinstance(value, list)
        and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        )
    )


def prompt_label(prompt: Prompt) -> str:
    """The text of the prompt, or of its last message, in quotes. Only the end of a long text is shown."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= 60 else f"…{text[-59:]}")


class ProblemStream:
    """An endless sequence of problems. Each epoch has all problems in a random order that depends on the seed."""

    def __init__(self, problems: Sequence[Problem], seed: int, purpose: str):
        self._problems, self._seed, self._purpose = problems, seed, purpose
        self._epoch, self._order = -1, []

    def take(self, start: int, count: int) -> list[Problem]:
        """Problems start … start + count - 1 of the sequence."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> Problem:
        epoch, place = divmod(position, len(self._problems))
        if epoch != self._epoch:
            shuffle = generator(self._seed, self._purpose, epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self._problems), generator=shuffle).tolist()
        return self._problems[self._order[place]]
