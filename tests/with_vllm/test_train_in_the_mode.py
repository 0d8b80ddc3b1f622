"""`minirl train` with vLLM's rollouts, in batch-invariant mode."""

from dataclasses import replace
from pathlib import Path

import pytest
from minirl.config import EvalConfig, ModelConfig
from minirl.config_file import load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "arithmetic.toml"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_discrepancy_in_the_mode(train, dtype):
    """Also for float32 weights under autocast, with replayed experts, and after new weights."""
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
    _, *steps = train(config)
    assert len(steps) == 3
    for step in steps:
        assert step["discrepancy_kl_k1"] == step["discrepancy_kl_k3"] == step["log_d_abs_max"] == 0.0
        assert step["routing_agreement_old_layer_0"] == step["routing_agreement_old_layer_1"] == 1.0
        assert step["routing_missing_tokens"] == 0
