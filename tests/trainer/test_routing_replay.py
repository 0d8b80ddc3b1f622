"""Routing replay in the trainer: Table 1 of the paper, and its metrics."""

from dataclasses import replace

import pytest
import torch
from minirl.config import ModelConfig
from minirl.errors import MiniRLError
from minirl.models import make_model

from minirl_kernels import RoutedExperts, record_routing


def collected(trainer):
    """(sampled batch of step 1, the same batch with old_log_probs)."""
    batch, _ = trainer.collect(1)
    return batch, trainer.with_old_log_probs(batch)[0]


@torch.no_grad()
def natural_log_probs(trainer, batch):
    """Log-probabilities of the first mini-batch with natural routing; the weights are the same as for old_log_probs."""
    minibatch = next(batch.split(trainer.config.minibatch_size))
    parts = []
    for micro in minibatch.micro_batches(trainer.config.micro_batch_size, trainer.model.device):
        with record_routing(trainer.model):
            parts.append(trainer._forward(trainer.model, micro).log_probs[micro.loss_mask])
    return torch.cat(parts)


def as_sampled_elsewhere(batch):
    """Shifts each recorded expert id by one, so that no id equals the training engine's choice."""
    routed = batch.routed_experts
    other = ((routed.experts.int() + 1) % routed.num_experts).to(routed.experts.dtype)
    return replace(batch, routed_experts=RoutedExperts(other, routed.valid, routed.num_experts))


def test_r2_leaves_the_first_minibatch_alone(config, make_trainer):
    trainer = make_trainer(config, routing_replay="R2")
    sampled, batch = collected(trainer)
    assert sampled.routed_experts is None
    first, second = batch.split(config.minibatch_size)
    assert torch.equal(first.old_log_probs[first.loss_mask], natural_log_probs(trainer, batch))
    update = trainer.update(first)
    assert update.metrics.compute()["log_r_abs_max"] == 0.0
    assert set(update.routing_agreement.compute("layer").values()) == {1.0}
    update = trainer.update(second)
    assert update.metrics.compute()["log_r_abs_max"] > 0.0
    assert min(update.routing_agreement.compute("layer").values()) < 1.0


def test_r3_changes_the_target_policy_from_the_first_minibatch_on(config, make_trainer):
    trainer = make_trainer(config, routing_replay="R3")
    sampled = as_sampled_elsewhere(trainer.collect(1)[0])
    batch, metrics = trainer.with_old_log_probs(sampled)
    first = next(batch.split(config.minibatch_size))
    natural = natural_log_probs(trainer, batch)
    assert (first.old_log_probs[first.loss_mask] - natural).abs().max() > 0.01
    assert metrics["routing_agreement_old_layer_0"] < 1.0
    update = trainer.update(first)
    assert update.metrics.compute()["log_r_abs_max"] == 0.0  # the update replays the experts of the pass before it
    assert update.routing_agreement.compute("routing_agreement_old") == {
        name: pytest.approx(value, abs=0.2) for name, value in metrics.items() if name.startswith("routing_agreement")
    }


@pytest.mark.parametrize(("dtype", "differs"), [(None, False), ("float32", False), ("bfloat16", True)])
def test_an_engine_of_another_dtype_makes_a_discrepancy(config, make_trainer, dtype, differs):
    trainer = make_trainer(config, routing_replay="R3", rollout=replace(config.rollout, dtype=dtype))
    batch = collected(trainer)[1]
    mask = batch.loss_mask
    assert ((batch.old_log_probs[mask] - batch.rollout_log_probs[mask]).abs().max() > 1e-3) == differs


@pytest.mark.parametrize("setting", ["R2", "R3"])
def test_ties_are_broken_alike_in_rollouts_and_training(config, make_trainer, setting):
    """In 16 bits, router scores often tie. Different tie-breaking would show a discrepancy that does not exist."""
    trainer = make_trainer(config, routing_replay=setting)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                weight[1:] = weight[0]
    trainer.sampler.engine.update_weights(trainer.model)
    batch = collected(trainer)[1]
    mask = batch.loss_mask
    assert (batch.old_log_probs[mask] - batch.rollout_log_probs[mask]).abs().max() < 1e-5


def test_r3_takes_the_experts_of_the_rollouts(config, make_trainer):
    trainer = make_trainer(config, routing_replay="R3")
    batch, _ = trainer.collect(1)
    length = batch.attention_mask.sum(1)
    # all tokens except the last, which was sampled but never decoded
    known = torch.arange(batch.input_ids.shape[1]) < length[:, None] - 1
    assert torch.equal(batch.routed_experts.valid, known[..., None].expand_as(batch.routed_experts.valid))
    _, metrics = trainer.with_old_log_probs(batch)
    assert metrics.pop("routing_missing_tokens") == 0
    # with the same weights, a decode with a cache and a whole forward differ only by rounding
    assert metrics.keys() == {"routing_agreement_old_layer_0", "routing_agreement_old_layer_1"}
    assert min(metrics.values()) > 0.99


@pytest.mark.parametrize("setting", ["disabled", "R2", "R3"])
def test_a_step_tells_the_agreement_of_each_layer(config, make_trainer, setting):
    metrics = make_trainer(config, routing_replay=setting).step(1)
    names = {name for name in metrics if name.startswith("routing_")}
    updates = {f"routing_agreement_layer_{layer}" for layer in range(2)}
    before = {f"routing_agreement_old_layer_{layer}" for layer in range(2)} | {"routing_missing_tokens"}
    assert names == {"disabled": set(), "R2": updates, "R3": updates | before}[setting]


def test_replay_that_means_nothing_is_refused(config):
    with pytest.raises(MiniRLError, match="routing_replay is 'R2' with num_minibatches=1: it must be"):
        replace(config, routing_replay="R2", num_minibatches=1).check()
    dense = ModelConfig(config={"model_type": "qwen3", "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
                                "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 32})  # fmt: skip
    with pytest.raises(
        MiniRLError, match="routing_replay is 'R3': it must be disabled, as model is a Qwen3ForCausalLM without"
    ):
        make_model(replace(config, routing_replay="R3", model=dense))
