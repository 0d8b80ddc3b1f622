"""A whole run: cold start, global steps with evaluations between them, and the files in its folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from .advice import RewardAdvice
from .cold_start import cold_start
from .config import TrainConfig
from .config_file import dump_config
from .context import check_problems
from .errors import MiniRLError
from .metrics import MetricsLog
from .models import make_model, run_mode
from .plots import plot_runs
from .progress import progress
from .run_dir import RunDir, replacing, replacing_folder
from .sampling import Sampler, held_out_problems, make_sampler
from .seeds import derive_seed
from .tasks import make_task
from .train import Trainer

WRITE_ERRORS = (OSError, SafetensorError)  # raised for a full disk


def train(config: TrainConfig, console: Console, *, overwrite: bool = False) -> RunDir:
    """Train with the settings of `config`. Raises MiniRLError, before any work where possible.

    The weights of the last finished update are saved in the folder, also if an error or a signal ends the run.
    """
    disable_progress_bar()
    config.check()
    run_dir = RunDir(Path(config.run_dir))
    with run_dir.held(overwrite):
        _train(config, run_dir, console)
    return run_dir


def _train(config: TrainConfig, run_dir: RunDir, console: Console) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    task = make_task(config.task)
    model, tokenizer = make_model(config)
    check_problems(config, model, tokenizer, task.train, with_answers=config.cold_start.steps > 0)
    check_problems(config, model, tokenizer, task.held_out)
    check_space(run_dir, model)
    sampler = make_sampler(config, model, tokenizer, task)
    run_dir.clear()
    with replacing(run_dir.config) as path:
        path.write_text(dump_config(config), encoding="utf-8")
    console.print(
        f"{run_dir.path}: {sum(weight.numel() for weight in model.parameters()):,} weights on {model.device}, "
        f"{len(task.train)} problems to train on, {len(task.held_out)} held out"
    )
    try:
        with MetricsLog(run_dir) as log, run_mode(config):
            run_cold_start(config, model, sampler, log, console)
            run_steps(config, model, sampler, log, console)
    except (MiniRLError, OSError) as error:
        raise MiniRLError(f"{error}; {keep(run_dir, model, tokenizer)}") from error
    except BaseException as error:
        error.add_note(keep(run_dir, model, tokenizer))
        raise
    finally:
        sampler.engine.close()
    save(run_dir, model, tokenizer)
    plot_runs([run_dir], run_dir.curves)


def check_space(run_dir: RunDir, model: PreTrainedModel) -> None:
    """Raises MiniRLError unless the disk has room for the weights."""
    needed = sum(weight.nbytes for weight in model.state_dict().values())
    replaced = sum(path.stat().st_size for path in run_dir.model.rglob("*"))
    free = shutil.disk_usage(run_dir.path).free + replaced
    if needed > free:
        raise MiniRLError(
            f"the disk of run_dir {run_dir.path} has {decimal(free)} free: it must have {decimal(needed)}, for the "
            "weights"
        )


def keep(run_dir: RunDir, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Save the weights of a run that an error or a signal ended. Returns a sentence that says where they are."""
    try:
        save(run_dir, model, tokenizer)
    except MiniRLError as error:
        return str(error)
    return f"{run_dir.model} has the weights that the last finished update made"


def save(run_dir: RunDir, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the model with its tokenizer, as a folder that transformers can load.

    Raises MiniRLError if this fails. The weights are then saved in a temporary folder instead, if possible.
    """

    try:
        _write(run_dir.model, model, tokenizer)
    except (MiniRLError, *WRITE_ERRORS) as error:
        other = Path(tempfile.mkdtemp(prefix="minirl-"))
        try:
            _write(other / "model", model, tokenizer)
        except WRITE_ERRORS as second:
            other.rmdir()
            raise MiniRLError(
                f"the weights are lost: {run_dir.model} cannot be written to ({error}), nor can {other} ({second})"
            ) from error
        raise MiniRLError(
            f"{run_dir.model} cannot be written to ({error}): {other / 'model'} has the weights"
        ) from error


def _write(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with replacing_folder(folder) as path:
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
                log.write("train", step, metrics)  # the step is done, even if the engine fails
            report(step, f"reward {metrics['reward_train']:.3f}  held-out {reward:.3f}")
    console.print(f"held-out reward: {before:.3f} before, {reward:.3f} after {config.steps} steps")
