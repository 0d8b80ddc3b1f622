"""A NaN or an infinity in a token of a loss: the error names the argument, or the token's results are NaN."""

import math

import pytest
import torch
from policy_batches import PRESETS, random_batch

from minirl_kernels import (
    PolicyLossConfig,
    fused_linear_policy_loss,
    fused_policy_loss,
    group_advantages,
    linear_token_logprobs,
    policy_loss,
    token_logprobs,
)
from minirl_kernels.ops.policy_loss.inputs import prepare_inputs
from minirl_kernels.ops.policy_loss.op import differentiable_loss

ARGUMENTS = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages")
WRONG = (math.nan, math.inf, -math.inf)
LENGTHS = [2, 3, 2]
ROW = 3  # row of token 1 of response 1


def batch_with(name, wrong, *, masked=False):
    batch = random_batch(LENGTHS, vocab_size=20)
    batch.loss_mask[:] = True
    batch.loss_mask[ROW] = not masked
    batch.advantages = batch.token_advantages().clone()
    values = getattr(batch, name, None)
    if values is not None:
        values[ROW] = wrong
    return batch


def losses(batch, layout, config, **options):
    """Calls of the three losses, the fused ones on two backends."""
    arguments = {**batch.arguments(layout), "config": config, **options}
    logits, ids = (batch.lay_out(x, layout) for x in (batch.logits, batch.token_ids))
    log_probs = torch.log_softmax(batch.logits, -1).gather(-1, batch.token_ids[:, None]).squeeze(-1)
    entropy = arguments.pop("entropy", None)
    yield lambda: policy_loss(batch.lay_out(log_probs, layout), entropy=entropy, **arguments)
    for backend in ("cpu", "reference"):
        yield lambda backend=backend: fused_policy_loss(logits, ids, backend=backend, **arguments)
        yield lambda backend=backend: fused_linear_policy_loss(logits, torch.eye(20), ids, backend=backend, **arguments)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_argument_and_its_first_place_are_named(name, wrong, cpu):
    for layout in ("padded", "packed"):
        config = PolicyLossConfig(kl_coef=0.1)
        for call in losses(batch_with(name, wrong), layout, config):
            with pytest.raises(ValueError, match=rf"^{name} is {wrong} at token 1 of response 1: it must be finite"):
                call()
        for call in losses(batch_with(name, wrong, masked=True), layout, config):
            assert call().loss.isfinite()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_without_a_look_it_is_nan_in_its_tokens_results(name, preset, wrong):
    """Nothing raises on a GPU, so the token must be NaN.

    A comparison with NaN is false, so a NaN in old_log_probs could switch MiniRL's mask off.
    """
    batch = batch_with(name, wrong)
    log_probs = -torch.linspace(0.5, 2, sum(LENGTHS))
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, loss_agg_mode="seq-mean-token-sum")
    for advantage in (1.0, -1.0, 0.0):
        batch.advantages = torch.full((sum(LENGTHS),), advantage)
        if name == "advantages":
            batch.advantages[ROW] = wrong
        arguments = dict.fromkeys(("num_responses", "num_tokens", "num_groups")) | batch.arguments("packed")
        leaf = log_probs.clone().requires_grad_()
        inputs = prepare_inputs(leaf.shape, leaf.device, raises=False, config=config, **arguments)
        out = differentiable_loss(leaf, None, inputs, None)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        assert out.loss.isnan()
        nan = grad.isnan().tolist()
        assert nan[ROW]
        # the tokens of a response share the ratio if the objective is per response
        assert not any(nan[:2] + nan[5:])
        assert config.is_sequence_level or nan.count(True) == 1
        assert out.metrics.compute()["num_overflow_tokens"] == nan.count(True)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_compiled_code_names_it_too(name):
    config = PolicyLossConfig(kl_coef=0.1)
    arguments = {**batch_with(name, -1.0).arguments("packed"), "config": config}
    log_probs = torch.full((sum(LENGTHS),), -1.0)

    def call(values):
        return policy_loss(log_probs, **{**arguments, name: values}).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(arguments[name]), call(arguments[name]))
    wrong = arguments[name].clone()
    wrong[ROW] = math.nan
    with pytest.raises(ValueError, match=f"{name} is nan at token 1 of response 1"):
        compiled(wrong)


def test_an_entropy_that_is_no_number():
    entropy = torch.ones(sum(LENGTHS))
    entropy[ROW] = math.nan
    config = PolicyLossConfig(entropy_coef=0.1)
    call = next(losses(batch_with("", 0), "packed", config, entropy=entropy))
    with pytest.raises(ValueError, match=r"^entropy is nan at token 1 of response 1"):
        call()
    assert next(losses(batch_with("", 0, masked=True), "packed", config, entropy=entropy))().loss.isfinite()


def test_log_probs_of_a_model_that_gives_no_number(cpu):
    """The token is NaN and counted, also with an advantage of 0. No error names an argument, because none is wrong."""
    for advantage in (1.0, 0.0):
        batch = batch_with("", 0)
        batch.advantages[ROW] = advantage
        batch.logits[ROW, 5] = math.nan
        for call in losses(batch, "packed", PolicyLossConfig()):
            out = call()
            assert out.loss.isnan()
            assert out.token_loss.isnan().tolist() == out.token_grad.isnan().tolist() == [i == ROW for i in range(7)]
            assert out.metrics.compute()["num_overflow_tokens"] == 1


@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_logits_that_are_no_number_are_overwritten_by_nan(preset, cpu):
    batch = batch_with("", 0)
    batch.logits[ROW, 5] = math.nan
    logits = batch.logits.requires_grad_()
    config = PolicyLossConfig.preset(preset)
    out = fused_policy_loss(
        logits, batch.token_ids, config=config, overwrite_logits=True, backend=cpu, **batch.arguments("packed")
    )
    (grad,) = torch.autograd.grad(out.loss, logits)
    assert grad[ROW].isnan().all()
    assert not grad[:2].isnan().any()
    assert not grad[5:].isnan().any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("wrong", [*WRONG, 0.0, -1.0])
def test_a_temperature_that_is_none(wrong, backend, cpu):
    """A negative or infinite temperature would give finite log-probabilities."""
    batch = batch_with("", 0)
    temperature = torch.ones(sum(LENGTHS))
    temperature[ROW] = wrong
    arguments = {**batch.arguments("packed"), "temperature": temperature, "backend": backend}
    per_token = {"temperature": temperature, "backend": backend}
    eye = torch.eye(20)
    for call in (
        lambda: fused_policy_loss(batch.logits, batch.token_ids, **arguments),
        lambda: fused_linear_policy_loss(batch.logits, eye, batch.token_ids, **arguments),
        lambda: token_logprobs(batch.logits, batch.token_ids, **per_token),
        lambda: linear_token_logprobs(batch.logits, eye, batch.token_ids, **per_token),
    ):
        with pytest.raises(ValueError, match=f"^temperature has the value {wrong}: it must be above 0 and finite"):
            call()


@pytest.mark.parametrize("wrong", WRONG)
def test_a_reward_that_is_no_number(wrong):
    with pytest.raises(ValueError, match=f"^rewards is {wrong} at response 2: it must be finite"):
        group_advantages(torch.tensor([1.0, 0.0, wrong, wrong]), torch.tensor([0, 0, 1, 1]))
