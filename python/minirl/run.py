"""A whole run: cold start, global steps with evaluations between them, and what is left in its folder."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .advice import RewardAdvice
from .cold_start import cold_start
from .config import TrainConfig
from .config_file import dump_config
from .errors import MiniRLError
from .metrics import MetricsLog
from .models import computing, make_model
from .plots import plot_runs
from .progress import progress
from .run_dir import RunDir, replacing
from .sampling import Sampler, held_out_problems, make_sampler
from .seeds import derive_seed
from .tasks import make_task
from .train import Trainer


def train(config: TrainConfig, console: Console, *, overwrite: bool = False) -> RunDir:
    """Train as `config` says. Raises MiniRLError, and what is known to be wrong is told before any work."""
    disable_progress_bar()
    config.check()
    run_dir = RunDir(Path(config.run_dir))
    run_dir.prepare(overwrite)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = make_task(config.task)
    model, tokenizer = make_model(config)
    sampler = make_sampler(config, model, tokenizer, task)
    run_dir.clear()
    with replacing(run_dir.config) as path:
        path.write_text(dump_config(config), encoding="utf-8")
    console.print(
        f"{run_dir.path}: {sum(weight.numel() for weight in model.parameters()):,} weights on {model.device}, "
        f"{len(task.train)} problems to train on, {len(task.held_out)} held out"
    )
    try:
        with MetricsLog(run_dir) as log, computing(config):
            run_cold_start(config, model, sampler, log, console)
            run_steps(config, model, sampler, log, console)
    except MiniRLError as error:
        # as after the last update: what was learned until then is not lost with an engine
        save(run_dir, model, tokenizer)
        raise MiniRLError(f"{error}; {run_dir.model} has the weights of the last finished step") from error
    finally:
        sampler.engine.close()
    save(run_dir, model, tokenizer)
    plot_runs([run_dir], run_dir.curves)
    return run_dir


def save(run_dir: RunDir, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model with its tokenizer, as a folder that transformers loads."""
    with replacing(run_dir.model) as path:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def run_cold_start(config: TrainConfig, model: PreTrainedModel, sampler: Sampler, log: MetricsLog, console: Console):
    """The supervised phase, logged as "cold_start"."""
    if not config.cold_start.steps:
        return
    with progress(console, "cold start", config.cold_start.steps) as report:
        reward = 0.0
        for step, metrics in cold_start(config, model, sampler):
            log.write("cold_start", step, metrics)
            reward = metrics.get("reward_train", reward)
            report(step, f"loss {metrics['loss']:.3f}  reward {reward:.3f}")
    console.print(f"cold start ended at step {step}, reward {reward:.3f} on training prompts")


def run_steps(config: TrainConfig, model: PreTrainedModel, sampler: Sampler, log: MetricsLog, console: Console):
    """The global steps with evaluations before, between and after them, logged as "train"."""
    trainer, advice = Trainer(config, model, sampler), RewardAdvice(config.rollout.max_new_tokens)
    held_out = held_out_problems(config, sampler.task, config.eval.prompts)

    def evaluate(step: int) -> float:
        reward, _ = sampler.average_at_k(held_out, config.eval.k, seed=derive_seed(config.seed, "eval", step))
        return reward

    before = reward = evaluate(0)
    log.write("train", 0, {"reward_held_out": reward})
    with progress(console, "training", config.steps) as report:
        for step in range(1, config.steps + 1):
            metrics = trainer.step(step)
            for line in advice.after(step, metrics):
                console.print(line)
            try:
                sampler.engine.update_weights(model)
                if step % config.eval.every == 0 or step == config.steps:
                    metrics["reward_held_out"] = reward = evaluate(step)
            finally:
                log.write("train", step, metrics)  # the step is done, whatever becomes of the engine
            report(step, f"reward {metrics['reward_train']:.3f}  held-out {reward:.3f}")
    console.print(f"held-out reward: {before:.3f} before, {reward:.3f} after {config.steps} steps")
