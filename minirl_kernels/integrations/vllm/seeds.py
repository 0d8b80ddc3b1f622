"""Seeded requests whose prompts are read in parts: vLLM 0.32 cannot sample them on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unread_prompts_draw_nothing(runner) -> Iterator[None]:
    """While a model runner samples. vLLM draws a token after each part of a prompt, and rewinds, which no CPU can."""
    batch = runner.input_batch
    unread = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    kept = {index: batch.generators.pop(index) for index in unread if index in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(kept)
