"""The prompts of a comparison: from a file, from the target's task, or random tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import MiniRLError
from ..seeds import generator
from ..tasks import ProblemStream, Prompt, is_prompt, make_task
from ..tokenizer import encode_prompt
from .target import Target

MADE_UP_LENGTHS = (4, 32)  # tokens of a made-up prompt, at least and at most


def make_prompts(
    target: Target, tokenizer: PreTrainedTokenizerBase, file: Path | None, count: int
) -> tuple[list[list[int]], str]:
    """(token ids of `count` prompts, description of their source).

    The source is the file if given, otherwise the target's task, otherwise random tokens. A file with fewer prompts
    gives all of them. Raises MiniRLError.
    """
    if file is not None:
        prompts = read_prompts(file)[:count]
        return [encode_prompt(tokenizer, prompt) for prompt in prompts], str(file)
    config = target.config
    if target.has_task:
        problems = ProblemStream(make_task(config.task).train, config.seed, "train").take(0, count)
        return [encode_prompt(tokenizer, problem.prompt) for problem in problems], f"the task, {config.task.kind}"
    draw = generator(config.seed, "discrepancy prompts")
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    least, most = MADE_UP_LENGTHS
    lengths = torch.randint(least, most + 1, (count,), generator=draw).tolist()
    return [
        ordinary[torch.randint(len(ordinary), (length,), generator=draw)].tolist() for length in lengths
    ], "made up of random tokens"


def read_prompts(path: Path) -> list[Prompt]:
    """One prompt per non-blank line: the key prompt in a .jsonl, otherwise the whole line. Raises MiniRLError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MiniRLError(f"cannot read --prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(line)
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MiniRLError(f"{path}, line {number}: not valid JSON: {error}") from None
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not prompt or not is_prompt(prompt):
            raise MiniRLError(
                f"{path}, line {number}: {line[:60]} must be an object whose prompt is text, or a list of messages "
                "with role and content"
            )
        prompts.append(prompt)
    if not prompts:
        raise MiniRLError(f"--prompts {path} has no prompts: it must have one per line")
    return prompts
