"""The command `minirl discrepancy`: makes the engines, compares them, and writes the report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from minirl_kernels import PolicyLossConfig
from minirl_kernels.discrepancy import DiscrepancyReport, compare_engines
from minirl_kernels.integrations.transformers import enable_log_probs

from ..config import RolloutConfig
from ..context import check_fits
from ..errors import MiniRLError
from ..models import end_token_ids, load_model, make_model, pick_device
from ..progress import progress
from ..run_dir import RunDir, replacing
from .engines import TrainingEngine, inference_engine, training_engine
from .picture import draw
from .prompts import make_prompts
from .settings import DiscrepancyOptions
from .show import number, show
from .target import Target
from .vllm import vllm_engine

FORMAT = 1  # version of the JSON file; increase it if a key is removed or changes its meaning


def discrepancy(name: str, target: Target, options: DiscrepancyOptions, console: Console) -> bool:
    """Compare the engines, print the report, and write discrepancy.json and discrepancy.png.

    name: the target as the user gave it. Returns whether the report is within --fail-above. Raises MiniRLError.
    """
    options.check()
    disable_progress_bar()
    replay = options.pi.routing_replay
    config = replace(target.config, device=options.device, routing_replay=replay)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model, tokenizer = make_model(config)
    prompts, source = make_prompts(target, tokenizer, options.prompts, options.responses)
    check_fits(model, max(map(len, prompts)), options.max_new_tokens, "--max-new-tokens")
    sampling = RolloutConfig(
        quantization=options.mu.quantization,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
    )
    folder = _made(target.folder if options.output is None else options.output.expanduser())
    ends = end_token_ids(model, tokenizer)
    pi = training_engine(model, options.pi, options.temperature, "pi", records_routing=replay == "R2")
    updated = None if options.updated_model is None else _updated(options, len(tokenizer))
    if updated is not None:
        check_fits(updated.model, max(map(len, prompts)), options.max_new_tokens, "--max-new-tokens")
    bounds = _bounds(config.policy_loss)
    if options.mu.engine == "vllm":
        longest = max(map(len, prompts))
        engine = vllm_engine(
            model,
            options.mu,
            sampling,
            ends,
            replays_routing=replay != "disabled",
            longest_prompt=longest,
            log=RunDir(folder).vllm_log,
        )
    else:
        # mu records for R2 too, as in training, since a recording router breaks ties by moe_routing's rule
        engine = nullcontext(inference_engine(model, options.mu, sampling, ends, records_routing=replay != "disabled"))
    with engine as mu, progress(console, "comparing", len(prompts)) as done:
        report = compare_engines(
            mu,
            pi,
            prompts,
            updated=updated,
            seed=options.seed,
            batch_size=options.batch_size,
            trace_sequences=options.trace_sequences,
            config=bounds,
            routing_replay=replay,
            progress=lambda count: done(count, "responses"),
        )
    show(report, console, bounds)
    table = {"format": FORMAT, "target": name, **asdict(options), "prompts": source, **report.to_dict()}
    written = folder / "discrepancy.json", folder / "discrepancy.png"
    kept = keep_earlier(written)
    if kept:
        console.print(f"  the earlier report is now in {' and '.join(path.name for path in kept)}")
    write_json(written[0], table)
    draw(report, written[1], f"{name}: μ is {options.mu.summary}, π is {options.pi.summary}")
    for path in written:
        console.print(f"  {path}")
    return _is_within(report, options, console)


def keep_earlier(paths: Sequence[Path]) -> list[Path]:
    """Rename the files of an earlier comparison, such as discrepancy-1.json, with one unused number for all.

    Returns the new names. Raises MiniRLError if a file cannot be renamed.
    """
    count = 1
    while any(_numbered(path, count).exists() for path in paths):
        count += 1
    kept = [(path, _numbered(path, count)) for path in paths if path.exists()]
    for old, new in kept:
        try:
            old.rename(new)
        except OSError as error:
            raise MiniRLError(f"{old} cannot be renamed to {new.name}: {error.strerror}") from None
    return [new for _, new in kept]


def _numbered(path: Path, count: int) -> Path:
    return path.with_name(f"{path.stem}-{count}{path.suffix}")


def _made(folder: Path) -> Path:
    """Create the folder before the comparison begins. Raises MiniRLError if it is not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MiniRLError(f"{folder} cannot be written to: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise MiniRLError(f"{folder} cannot be written to: it must be writable")
    return folder


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write JSON, with null for infinity and NaN. Raises MiniRLError if path is not writable."""
    try:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(_finite(table), indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise MiniRLError(f"{path} cannot be written to: {error.strerror}") from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _updated(options: DiscrepancyOptions, vocab_size: int) -> TrainingEngine:
    """The engine pi_theta, with the settings of pi."""
    model, tokenizer = load_model(options.updated_model, options.pi.experts_implementation)
    if len(tokenizer) != vocab_size:
        raise MiniRLError(
            f"--updated-model {options.updated_model} has {len(tokenizer)} tokens: it must have {vocab_size}, as the "
            "target has"
        )
    try:
        model = enable_log_probs(model.to(pick_device(options.device)))
    except (TypeError, ValueError) as error:
        raise MiniRLError(f"--updated-model {options.updated_model} cannot be scored with: {error}") from None
    return training_engine(model, options.pi, options.temperature, "pi")


def _bounds(config: PolicyLossConfig) -> PolicyLossConfig:
    """The run's clip bounds and truncation threshold if its objective is MiniRL; otherwise MiniRL's defaults."""
    if config.objective != "minirl":
        return PolicyLossConfig()
    return PolicyLossConfig(
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        rollout_is_threshold=config.rollout_is_threshold,
    )


def _is_within(report: DiscrepancyReport, options: DiscrepancyOptions, console: Console) -> bool:
    if options.fail_above is None:
        return True
    value = report.headline[options.fail_metric]
    within = value <= options.fail_above  # False for NaN
    relation = "within" if within else "not within"
    console.print(f"{options.fail_metric} is {number(value)}: {relation} --fail-above {options.fail_above:g}")
    return within
