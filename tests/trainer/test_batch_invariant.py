"""Training in batch-invariant mode: no discrepancy in any step, repeatable runs, and refused settings."""

from dataclasses import replace

import pytest
import torch
from minirl.config import ModelConfig
from minirl.errors import MiniRLError
from minirl.evaluate import evaluate
from minirl.models import make_model, run_mode
from minirl.run import train
from minirl.sampling import Sampler
from rich.console import Console

from minirl_kernels.batch_invariant import is_batch_invariant

pytestmark = pytest.mark.usefixtures("cpu")
DISCREPANCY = ("discrepancy_kl_k1", "discrepancy_kl_k3", "log_d_abs_max")
# wide enough for torch's own products to depend on the batch
WIDE = {
    "model_type": "qwen3_moe",
    "hidden_size": 96,
    "intermediate_size": 64,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}


@pytest.fixture
def wide(config):
    """A configuration with updates at a temperature other than 1."""
    return replace(config, model=ModelConfig(config=WIDE), rollout=replace(config.rollout, temperature=0.8))


@pytest.fixture
def steps(make_trainer):
    """(metrics of some steps with two updates each, weights at the end)."""

    def run(config, count, **changes):
        config = replace(config, batch_invariant=True, **changes)
        trainer = make_trainer(config)
        with run_mode(config):
            return [trainer.step(number) for number in range(1, count + 1)], trainer.model.state_dict()

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_step_has_a_discrepancy_and_the_same_run_ends_the_same(wide, steps, dtype):
    metrics, weights = steps(wide, 20, dtype=dtype)
    assert all(step[name] == 0.0 for step in metrics for name in DISCREPANCY)
    assert all(step["staleness_kl_k3"] > 0 for step in metrics)  # the policy did change
    again, same_weights = steps(wide, 20, dtype=dtype)
    assert [step["loss"] for step in again] == [step["loss"] for step in metrics]
    assert all(torch.equal(same_weights[name], value) for name, value in weights.items())


@pytest.mark.parametrize("setting", ["R2", "R3"])
def test_with_routing_replay(wide, steps, setting):
    metrics, _ = steps(wide, 2, routing_replay=setting)
    assert all(step[name] == 0.0 for step in metrics for name in DISCREPANCY)


def test_a_dtype_of_the_rollouts_own_is_a_discrepancy_still(wide, steps):
    metrics, _ = steps(wide, 1, rollout=replace(wide.rollout, dtype="bfloat16"))
    assert metrics[0]["discrepancy_kl_k3"] > 0


def test_without_it_there_is_one(wide, make_trainer):
    assert make_trainer(wide, dtype="bfloat16").step(1)["discrepancy_kl_k3"] > 0


def test_a_run_and_its_evaluation_are_in_it(wide, monkeypatch):
    seen = []
    sample = Sampler.sample
    monkeypatch.setattr(
        Sampler, "sample", lambda *args, **kwargs: (seen.append(is_batch_invariant()), sample(*args, **kwargs))[1]
    )
    run_dir = train(replace(wide, batch_invariant=True, steps=1), Console(quiet=True))
    during_training = len(seen)
    evaluate(run_dir)
    assert len(seen) > during_training > 0
    assert all(seen)
    assert not is_batch_invariant()


def test_what_it_refuses(config):
    model = replace(config.model, experts_implementation="eager")
    with pytest.raises(MiniRLError, match=r"model\.experts_implementation is 'eager' with batch_invariant: it must be"):
        replace(config, batch_invariant=True, model=model).check()
    gpt_oss = {**WIDE, "model_type": "gpt_oss", "num_local_experts": 4}
    del gpt_oss["moe_intermediate_size"], gpt_oss["num_experts"]
    with pytest.raises(MiniRLError, match="it must be another where GptOssAttention asks for attention sinks"):
        make_model(replace(config, batch_invariant=True, model=ModelConfig(config=gpt_oss)))
