"""avg@k of a finished run: its final model on held-out problems."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers.utils.logging import disable_progress_bar

from .config_file import load_config
from .context import check_problems
from .loading import check_computes, load_model
from .models import autocast, make_batch_invariant, pick_device, run_mode
from .run_dir import RunDir
from .sampling import held_out_problems, make_sampler
from .seeds import derive_seed
from .tasks import make_task


@dataclass(frozen=True)
class Evaluation:
    """Mean reward of k responses to each of some held-out prompts, and its standard error over the prompts."""

    reward: float
    standard_error: float
    k: int
    prompts: int


def evaluate(run_dir: RunDir, *, k: int | None = None, prompts: int | None = None, seed: int = 0) -> Evaluation:
    """Sample with the settings of the run; k and prompts default to its eval.k and eval.prompts. Raises MiniRLError."""
    disable_progress_bar()
    config = replace(load_config(run_dir.ended().config), run_dir=str(run_dir.path))  # the folder may have been moved
    config.check()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = make_task(config.task)
    model, tokenizer = load_model(str(run_dir.model), config.model.experts_implementation)
    if config.batch_invariant:
        make_batch_invariant(model)
    model = model.to(pick_device(config.device))
    with run_mode(config), autocast(model.device, config.dtype):
        check_computes(model, str(run_dir.model))
    problems = held_out_problems(config, task, prompts or config.eval.prompts)
    check_problems(config, model, tokenizer, problems)
    sampler = make_sampler(config, model, tokenizer, task)
    k = k or config.eval.k
    try:
        with run_mode(config):
            reward, standard_error = sampler.average_at_k(problems, k, seed=derive_seed(seed, "minirl eval"))
    finally:
        sampler.engine.close()
    return Evaluation(reward, standard_error, k, len(problems))
