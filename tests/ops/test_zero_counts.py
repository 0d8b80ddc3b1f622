"""A mini-batch without tokens: a count that is a tensor of 0 gives a loss of 0 and no gradient, not 0 / 0."""

import math

import pytest
import torch
from policy_batches import random_batch

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss, fused_policy_loss, policy_loss
from minirl_kernels.ops.policy_loss.inputs import prepare_inputs

LENGTHS = [2, 3]
COUNT_OF_MODE = {
    "seq-mean-token-sum": "num_responses",
    "seq-mean-token-mean": "num_responses",
    "seq-mean-token-sum-norm": "num_responses",
    "token-mean": "num_tokens",
    "group-token-mean": "num_groups",
}
MODES = pytest.mark.parametrize("mode", COUNT_OF_MODE)


def config_of(mode, preset="minirl"):
    factor = 16.0 if mode.endswith("norm") else None
    return PolicyLossConfig.preset(preset, entropy_coef=0.1, kl_coef=0.1, loss_agg_mode=mode, loss_scale_factor=factor)


def calls(batch, config, layout="packed", **counts):
    """Each loss as a function that returns (loss, gradients)."""
    arguments = {**batch.arguments(layout), "config": config, **counts}
    logits, ids = (batch.lay_out(x, layout) for x in (batch.logits, batch.token_ids))
    masked = batch.lay_out(~batch.loss_mask, layout) if layout == "padded" else ~batch.loss_mask

    def of(function, *leaves, **options):
        def call():
            given = [leaf.detach().clone().requires_grad_() for leaf in leaves]
            out = function(*given, **options)
            return out.loss.detach(), torch.autograd.grad(out.loss, given)

        return call

    def from_log_probs(log_probs, entropy):
        return policy_loss(log_probs, entropy=entropy, **arguments)

    per_token = torch.full(ids.shape, -1.0)
    # the values outside of the mask are NaN
    yield of(from_log_probs, per_token.masked_fill(masked, math.nan), (-per_token).masked_fill(masked, math.nan))
    for backend in ("cpu", "reference"):
        yield of(lambda x, backend=backend: fused_policy_loss(x, ids, backend=backend, **arguments), logits)
        yield of(
            lambda x, w, backend=backend: fused_linear_policy_loss(x, w, ids, backend=backend, **arguments),
            logits.nan_to_num(),
            torch.eye(20),
        )


@MODES
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_no_token_in_the_loss_and_a_count_of_zero(preset, mode, cpu):
    batch = random_batch(LENGTHS, vocab_size=20)
    batch.loss_mask[:] = False
    for layout in ("padded", "packed"):
        for call in calls(batch, config_of(mode, preset), layout, **{COUNT_OF_MODE[mode]: torch.tensor(0)}):
            loss, grads = call()
            assert loss == 0
            assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("count", [0.0, -1.0, math.nan, math.inf])
@MODES
def test_a_count_of_tokens_that_are_there(mode, count, cpu):
    """The CPU names the invalid count; without checks, the weights of the tokens are NaN."""
    batch = random_batch(LENGTHS, vocab_size=20)
    name, config = COUNT_OF_MODE[mode], config_of(mode)
    for call in calls(batch, config, **{name: torch.tensor(count)}):
        with pytest.raises(ValueError, match=rf"^{name} is {count}: it must be above 0 and finite"):
            call()
    arguments = dict.fromkeys(("num_responses", "num_tokens", "num_groups")) | batch.arguments("packed")
    arguments[name] = torch.tensor(count)
    inputs = prepare_inputs(batch.token_ids.shape, batch.logits.device, raises=False, config=config, **arguments)
    assert torch.equal(inputs.weights.isnan(), batch.loss_mask)
    assert not inputs.weights[~batch.loss_mask].any()


@pytest.mark.parametrize("count", [0, 0.0, math.inf])
def test_a_number_is_known_when_the_call_is_made(count, cpu):
    batch = random_batch(LENGTHS, vocab_size=20)
    for call in calls(batch, config_of("seq-mean-token-sum"), num_responses=count):
        with pytest.raises(ValueError, match=rf"^num_responses is {count}: it must be above 0 and finite"):
            call()


def test_compiled_code_takes_either():
    batch = random_batch(LENGTHS, vocab_size=20)
    arguments = {**batch.arguments("packed"), "config": config_of("token-mean")}
    log_probs, entropy = torch.full((5,), -1.0), torch.ones(5)

    def call(mask, count):
        return policy_loss(log_probs, entropy=entropy, **{**arguments, "loss_mask": mask, "num_tokens": count}).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    none = torch.zeros(5, dtype=torch.bool)
    assert torch.equal(compiled(~none, torch.tensor(5)), call(~none, torch.tensor(5)))
    assert compiled(none, torch.tensor(0)) == 0
    with pytest.raises(ValueError, match="num_tokens is 0"):
        compiled(~none, torch.tensor(0))
