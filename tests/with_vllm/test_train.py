"""`minirl train` with vLLM's rollouts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from minirl.cli import main
from minirl.config import EvalConfig, ModelConfig
from minirl.config_file import dump_config, load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic.toml"


def train(config, tmp_path):
    """The lines of metrics.jsonl that its steps wrote."""
    path = tmp_path / "config.toml"
    path.write_text(dump_config(replace(config, run_dir=str(tmp_path / "run"))))
    main(["train", str(path), "--rollout.engine", "vllm"])
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["phase"] == "train"]


def test_the_example_learns(tmp_path):
    config = replace(load_config(EXAMPLE), steps=16, eval=EvalConfig(every=16))
    before, *steps = train(config, tmp_path)
    assert steps[-1]["reward_held_out"] > before["reward_held_out"] + 0.08
    assert all(0 < step["log_d_abs_max"] < 1e-4 for step in steps)  # two engines, in float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_discrepancy_in_the_mode(tmp_path, dtype):
    """In float32 weights under autocast too, with replayed experts, and after weights were handed over."""
    config = load_config(EXAMPLE)
    small = ModelConfig(config=config.model.config | {"num_hidden_layers": 2})
    config = replace(
        config,
        steps=3,
        prompts_per_minibatch=8,
        model=small,
        dtype=dtype,
        batch_invariant=True,
        routing_replay="R3",
        cold_start=replace(config.cold_start, steps=5),
        eval=EvalConfig(every=3, k=1, prompts=8),
    )
    _, *steps = train(config, tmp_path)
    assert len(steps) == 3
    for step in steps:
        assert step["discrepancy_kl_k1"] == step["discrepancy_kl_k3"] == step["log_d_abs_max"] == 0.0
        assert step["routing_agreement_old_layer_0"] == step["routing_agreement_old_layer_1"] == 1.0
        assert step["routing_missing_tokens"] == 0
