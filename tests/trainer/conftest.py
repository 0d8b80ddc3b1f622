"""A run that takes no time: a two-layer mixture of experts of a few thousand weights, on sums up to 9."""

from dataclasses import replace

import pytest
from minirl.config import (
    ColdStartConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from minirl.config_file import dump_config
from minirl.models import make_model
from minirl.sampling import make_sampler
from minirl.tasks import make_task
from minirl.train import Trainer

TINY_MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "initializer_range": 0.3,  # so that no two tokens are equally likely
}


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        steps=2,
        prompts_per_minibatch=3,
        num_minibatches=2,
        micro_batch_size=8,
        model=ModelConfig(config=TINY_MODEL),
        task=TaskConfig(max_operand=29),
        cold_start=ColdStartConfig(steps=2, batch_size=8, check_every=1),
        rollout=RolloutConfig(group_size=4, max_new_tokens=6, batch_size=16),
        optimizer=OptimizerConfig(lr=1e-2),
        eval=EvalConfig(every=1, k=2, prompts=6),
    )


@pytest.fixture
def make_trainer():
    """Makes a trainer whose task pays for responses of odd length: sums would be beyond an untrained model."""

    def make(config, **changes) -> Trainer:
        config = replace(config, **changes)
        model, tokenizer = make_model(config)
        sampler = make_sampler(config, model, tokenizer, make_task(config.task))
        sampler.task.reward = lambda problem, response: float(len(response) % 2)
        return Trainer(config, model, sampler)

    return make


@pytest.fixture
def config_file(tmp_path, config):
    """Writes the configuration, with some changes, and gives the path of the file."""

    def write(**changes):
        path = tmp_path / "config.toml"
        path.write_text(dump_config(replace(config, **changes)))
        return path

    return write
