"""model.experts_implementation: the same updates with minirl's experts, with and without replay, and refused values."""

from dataclasses import replace

import pytest
import torch
from minirl.cli import main
from minirl.config import ModelConfig
from minirl.errors import MiniRLError
from minirl.models import make_model
from tiny_moe import count_calls

DENSE = {"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}
GPT_OSS = {**DENSE, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
SMALL = {"num_hidden_layers": 1, "intermediate_size": 32}


@pytest.fixture
def ours(config):
    return replace(config.model, experts_implementation="minirl")


@pytest.fixture
def calls(cpu, monkeypatch):
    """The number of tokens in each call of moe_experts."""
    return count_calls(monkeypatch)


@pytest.mark.parametrize("setting", ["disabled", "R2", "R3"])
def test_the_first_update(config, ours, make_trainer, calls, setting):
    """The first update equals the update with transformers' experts up to rounding, on the same batch."""
    stock, trainer = (make_trainer(config, routing_replay=setting, model=model) for model in (config.model, ours))
    sampled, _ = stock.collect(1)
    calls.clear()
    found = []
    for each in (stock, trainer):
        batch = each.with_old_log_probs(sampled)[0]
        found.append((batch.old_log_probs[batch.loss_mask], each.update(next(batch.split(config.minibatch_size)))))
        assert bool(calls) == (each is trainer)
    (expected, stock_update), (old_log_probs, update) = found
    torch.testing.assert_close(old_log_probs, expected, rtol=1e-5, atol=1e-5)
    assert update.metrics.compute()["log_r_abs_max"] == 0.0
    assert update.loss == pytest.approx(stock_update.loss, rel=1e-4, abs=1e-5)
    assert update.grad_norm == pytest.approx(stock_update.grad_norm, rel=1e-4)


def test_a_run_and_its_evaluation(config_file, ours, calls, tmp_path):
    main(["train", str(config_file(model=ours, routing_replay="R3", steps=1))])
    assert calls
    calls.clear()
    main(["eval", str(tmp_path / "run")])
    assert calls
    second = ModelConfig(path=str(tmp_path / "run" / "model"), experts_implementation="minirl")
    calls.clear()
    main(["train", str(config_file(model=second, run_dir=str(tmp_path / "second"), steps=1))])
    assert calls


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ({}, "minrl", r"model\.experts_implementation is 'minrl': it must be one of eager, .*\bminirl\b.*, or none$"),
        (DENSE, "minirl", r"is 'minirl': it must be none for a Qwen3ForCausalLM, which has no experts that take one$"),
        (DENSE, "eager", r"is 'eager': it must be none for a Qwen3ForCausalLM"),
        (GPT_OSS, "minirl", r"cannot be trained: experts_implementation is 'minirl': it must .*GptOssExperts, whose "),
        (
            {"experts_implementation": "eager"},
            None,
            r"model\.config has experts_implementation: it must be left out",
        ),
    ],
)
def test_what_is_refused(config, model, name, message):
    keys = {**(config.model.config if "model_type" not in model else SMALL), **model}
    with pytest.raises(MiniRLError, match=message):
        make_model(replace(config, model=ModelConfig(config=keys, experts_implementation=name)))
