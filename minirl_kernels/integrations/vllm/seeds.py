"""Seeded requests whose prompts are computed in chunks: vLLM 0.32 cannot sample them on a CPU."""

from __future__ import annotations

import numpy as np


def spare_generators(runner) -> None:
    """Give a model runner's sampler no generator for a prompt that is not whole yet, whose token is thrown away.

    vLLM turns such a generator back by an offset, which those of CPUs do not have, and dies of it.
    """
    sample_tokens, batch = runner.sample_tokens, runner.input_batch

    def sampled(*args, **kwargs):
        unfinished = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        spared = {row: batch.generators.pop(row) for row in unfinished if row in batch.generators}
        output = sample_tokens(*args, **kwargs)
        batch.generators.update(spared)
        return output

    runner.sample_tokens = sampled
