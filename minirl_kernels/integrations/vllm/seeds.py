"""A fix for seeded requests with chunked prompts, which vLLM 0.32 cannot sample on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unread_prompts_draw_nothing(runner) -> Iterator[None]:
    """Removes the generators of requests whose prompts are not read completely, while the model runner samples.

    vLLM draws a token after each chunk of a prompt, and then rewinds the generator. Rewinding fails on a CPU.
    """
    batch = runner.input_batch
    unread = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    kept = {index: batch.generators.pop(index) for index in unread if index in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(kept)
