"""The global step: exact results, and settings that must not change the update."""

import copy
import typing
from dataclasses import replace

import pytest
import torch
from minirl.batch import Batch
from minirl.cold_start import answered, supervised_loss
from minirl.errors import MiniRLError
from minirl.models import make_model
from minirl.tasks import Problem

from minirl_kernels import PolicyLossConfig
from minirl_kernels.config import LossAggMode

AGG_MODES = typing.get_args(LossAggMode)


def untimed(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds_")}


def collected(trainer) -> Batch:
    """The batch of step 1 with its old_log_probs."""
    batch, _ = trainer.collect(1)
    return trainer.with_old_log_probs(batch)[0]


def test_first_minibatch_is_on_policy_to_the_last_bit(config, make_trainer):
    trainer = make_trainer(config)
    first, second = collected(trainer).split(config.minibatch_size)
    assert len(first) % config.micro_batch_size != 0  # micro-batches of unequal size
    assert trainer.update(first).metrics.compute()["log_r_abs_max"] == 0.0
    assert trainer.update(second).metrics.compute()["log_r_abs_max"] > 0.0


@pytest.mark.parametrize("mode", AGG_MODES)
def test_micro_batches_do_not_change_the_update(config, make_trainer, mode):
    scale = 6.0 if mode == "seq-mean-token-sum-norm" else None
    policy_loss = PolicyLossConfig(loss_agg_mode=mode, loss_scale_factor=scale)
    trainer = make_trainer(config, policy_loss=policy_loss)
    minibatch = next(collected(trainer).split(config.minibatch_size))
    losses, gradients = [], []
    for micro_batch_size in (12, 4) if mode == "group-token-mean" else (12, 5, 1):
        part = make_trainer(config, policy_loss=policy_loss, micro_batch_size=micro_batch_size)
        before = copy.deepcopy(part.model.state_dict())
        part.optimizer = torch.optim.SGD(part.model.parameters(), lr=1.0)
        update = part.update(minibatch)
        losses.append(update.loss)
        scale = max(1.0, update.grad_norm / config.optimizer.max_grad_norm)
        gradients.append({name: (before[name] - value) * scale for name, value in part.model.state_dict().items()})
        assert update.metrics.compute()["num_responses"] == len(minibatch)
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    assert largest > 0
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
        for name, value in gradient.items():
            torch.testing.assert_close(value, gradients[0][name], rtol=1e-4, atol=1e-5 * float(largest))


def test_gradient_is_that_of_the_equation(config, make_trainer):
    """Eq. 7 on the first mini-batch, where r = 1: minus the mean over responses of sum_t min(d_t, C) A log pi_t."""
    trainer = make_trainer(config)
    minibatch = next(collected(trainer).split(config.minibatch_size))
    minibatch = replace(minibatch, rollout_log_probs=minibatch.rollout_log_probs - 1.0)  # d = e
    model = copy.deepcopy(trainer.model)
    log_probs = model(minibatch.input_ids).logits.log_softmax(-1)
    log_probs = log_probs.gather(-1, minibatch.token_ids.clamp(min=0)[..., None]).squeeze(-1)
    weights = (log_probs.detach() - minibatch.rollout_log_probs).exp().clamp(max=5) * minibatch.loss_mask
    expected = -(weights * minibatch.advantages[:, None] * log_probs).sum() / len(minibatch)
    expected.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    update = trainer.update(minibatch)
    assert update.loss == pytest.approx(expected.item(), rel=1e-4)
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_step(config, make_trainer):
    trainer = make_trainer(config)
    before = copy.deepcopy(trainer.model.state_dict())
    metrics = trainer.step(1)
    assert metrics["num_responses"] == 24  # 2 mini-batches of 3 prompts, 4 responses each: each used once
    assert metrics["num_tokens"] == pytest.approx(24 * metrics["response_length"])
    assert 0 <= metrics["reward_train"] <= 1
    assert metrics["discrepancy_kl_k3"] < 1e-9
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_no_logits_but_those_to_sample_from(config, make_trainer):
    trainer = make_trainer(config)
    sizes = []
    trainer.model.lm_head.register_forward_hook(lambda module, arguments, logits: sizes.append(logits.shape[:-1]))
    batch, _ = trainer.collect(1)
    assert {length for _, length in sizes} == {1}
    sizes.clear()
    trainer.update(next(trainer.with_old_log_probs(batch)[0].split(config.minibatch_size)))
    supervised_loss(trainer.model, batch.input_ids, batch.attention_mask, config.dtype)
    assert len(sizes) > 2
    assert {size.numel() for size in sizes} == {0}


def test_a_head_that_is_not_linear_is_told(config, monkeypatch):
    model, _ = make_model(config)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    monkeypatch.setattr("minirl.models.build_model", lambda *arguments: model)
    with pytest.raises(MiniRLError, match="this model cannot be trained: the output embeddings of Qwen3MoeForCausalLM"):
        make_model(config)


def test_same_seed_same_metrics(config, make_trainer):
    first, again, other = (make_trainer(config, seed=seed) for seed in (0, 0, 1))
    steps = [[untimed(trainer.step(number)) for number in (1, 2)] for trainer in (first, again, other)]
    assert steps[0] == steps[1]
    assert steps[0] != steps[2]


@pytest.mark.parametrize("preset", ["reinforce", "sequence_is", "grpo", "cispo", "gspo"])
def test_every_preset_steps(config, make_trainer, preset):
    trainer = make_trainer(config, preset=preset, policy_loss=PolicyLossConfig.preset(preset))
    trainer.config.check()
    metrics = trainer.step(1)
    assert metrics["num_responses"] == 24


def test_reference_policy(config, make_trainer):
    trainer = make_trainer(config, policy_loss=PolicyLossConfig(kl_coef=0.1))
    assert trainer.step(1)["kl_ref"] < trainer.step(2)["kl_ref"]
    assert "kl_ref" not in make_trainer(config).step(1)


def test_bfloat16(config, make_trainer):
    trainer = make_trainer(config, dtype="bfloat16")
    batch = collected(trainer)
    in_float32 = make_trainer(config).with_old_log_probs(batch)[0].old_log_probs
    assert 1e-4 < (batch.old_log_probs - in_float32).abs().mean() < 0.1
    metrics = trainer.update(next(batch.split(config.minibatch_size))).metrics.compute()
    assert metrics["log_r_abs_max"] == 0.0
    assert metrics["discrepancy_kl_k3"] < 0.01
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_divergence_is_told(config, make_trainer):
    trainer = make_trainer(config)
    with torch.no_grad():
        trainer.model.lm_head.weight[:, 0] = torch.nan
    minibatch = next(collected(make_trainer(config)).split(config.minibatch_size))
    with pytest.raises(MiniRLError, match="the gradient norm is nan: it must be finite"):
        trainer.update(minibatch)


@pytest.mark.parametrize("name", ["old_log_probs", "ref_log_probs"])
def test_log_probs_that_are_not_finite_are_told(config, make_trainer, name):
    """A comparison with NaN is false, so a NaN in old_log_probs would silently disable clipping."""
    trainer = make_trainer(config, policy_loss=PolicyLossConfig(kl_coef=0.1))
    batch, _ = trainer.collect(1)
    with torch.no_grad():
        (trainer.model if name == "old_log_probs" else trainer.reference).lm_head.weight[:, 0] = torch.nan
    with pytest.raises(MiniRLError, match=rf"{name} is nan at token \d+ of response 0 to prompt 0 of this step"):
        trainer.with_old_log_probs(batch)


def test_a_loss_that_overflows_is_told(config, make_trainer):
    config = replace(config, micro_batch_size=config.rollout.group_size)
    trainer = make_trainer(config, policy_loss=PolicyLossConfig.reinforce())
    batch = next(collected(trainer).split(config.minibatch_size))
    batch.advantages[:] = 1.0
    batch.rollout_log_probs[config.rollout.group_size] -= 200  # exp(200) is no float32
    with pytest.raises(MiniRLError, match=r"the loss overflows at token .* of response 0, ") as raised:
        trainer.update(batch)
    assert f"(responses of this mini-batch from {config.rollout.group_size} on)" in str(raised.value)


def test_supervised_loss_is_the_cross_entropy_of_the_answers(config):
    model, tokenizer = make_model(config)
    input_ids, is_answer = answered([Problem("1+2=", "3"), Problem("12+25=", "37")], tokenizer)
    assert is_answer.sum(1).tolist() == [2, 3]  # the end-of-sequence token is trained too
    assert (input_ids[is_answer] == tokenizer.eos_token_id).sum() == 2
    loss = supervised_loss(model, input_ids, is_answer, "float32")
    targets = input_ids.where(is_answer, -100)[:, 1:]
    logits = model(input_ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
