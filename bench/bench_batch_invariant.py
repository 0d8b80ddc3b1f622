"""The cost of batch-invariant mode in the example: the rollout of a step, and its updates, with and without it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import Bar, Contender, Inputs
from minirl.batch import Batch
from minirl.config import TrainConfig
from minirl.config_file import load_config
from minirl.models import make_model, run_mode
from minirl.sampling import make_sampler
from minirl.tasks import make_task
from minirl.train import Trainer

CONFIG = load_config(Path(__file__).resolve().parent.parent / "examples" / "arithmetic.toml")
ON, OFF = "batch_invariant = true", "batch_invariant = false"


@dataclass
class Run:
    """The trainer of the example before its first step, and the mini-batches of that step."""

    config: TrainConfig
    trainer: Trainer
    minibatches: list[Batch]

    @classmethod
    def make(cls, config: TrainConfig) -> Run:
        model, tokenizer = make_model(config)
        trainer = Trainer(config, model, make_sampler(config, model, tokenizer, make_task(config.task)))
        with run_mode(config):
            batch, _ = trainer.collect(1)
            batch, _ = trainer.with_old_log_probs(batch)
        return cls(config, trainer, list(batch.split(config.minibatch_size)))


@dataclass
class Runs(Inputs):
    """With the mode and without. Updates change the weights, and their time does not depend on the weights."""

    on: Run
    off: Run


def runs(tokens, *, dtype, device) -> Runs:
    """`tokens` is the number of prompts of a mini-batch."""
    config = replace(
        CONFIG,
        threads=None,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        prompts_per_minibatch=tokens,
    )
    return Runs(Run.make(replace(config, batch_invariant=True)), Run.make(config))


def rollout(run: Run):
    """Sample and grade all responses of a step."""
    with run_mode(run.config):
        batch, _ = run.trainer.collect(1)
    return {"responses": torch.tensor(len(batch))}


def updates(run: Run):
    """All updates of a step, each after the pass that computes old_log_probs."""
    with run_mode(run.config):
        for minibatch in run.minibatches:
            run.trainer.with_old_log_probs(minibatch)
            run.trainer.update(minibatch)
    return {"updates": torch.tensor(len(run.minibatches))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("what", [rollout, updates], ids=["rollout", "updates"])
def test_batch_invariant(compare, device, dtype, what):
    compare(
        {"rollout": "the rollout of a step", "updates": "the updates of a step"}[what.__name__],
        make=partial(runs, dtype=dtype, device=device),
        contenders=lambda batch: [
            Contender(ON, partial(what, batch.on), kind="ours"),
            Contender(OFF, partial(what, batch.off)),
        ],
        shape={"tokens": CONFIG.prompts_per_minibatch},
        small={"tokens": 2},
        dtype=dtype,
        floor_bytes=lambda batch: sum(weight.nbytes for weight in batch.on.trainer.model.parameters()),
        bars=[Bar(ON, "time", OFF, 1.3)] if device.type == "cpu" else [],
    )
