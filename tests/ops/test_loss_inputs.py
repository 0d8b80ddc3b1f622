"""PolicyLossInputs: prepared once for a mini-batch, split into micro-batches, and given in place of the arguments."""

import math

import pytest
import torch
from policy_batches import random_batch

from minirl_kernels import (
    PolicyLossConfig,
    PolicyLossInputs,
    fused_linear_policy_loss,
    fused_policy_loss,
    policy_loss,
)

pytestmark = pytest.mark.usefixtures("cpu")

LENGTHS = [5, 1, 4, 9, 3, 2]
PRESETS = ("minirl", "reinforce", "sequence_is", "grpo", "cispo", "gspo")
MODES = (
    {"loss_agg_mode": "seq-mean-token-sum"},
    {"loss_agg_mode": "seq-mean-token-mean"},
    {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 7.0},
    {"loss_agg_mode": "token-mean"},
    {"loss_agg_mode": "group-token-mean"},
)


def from_log_probs(logits, token_ids, **options):
    log_p = logits.float().log_softmax(-1)
    log_probs = log_p.gather(-1, token_ids.clamp(0, logits.shape[-1] - 1)[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return policy_loss(log_probs, entropy=entropy, **options)


def from_hidden(logits, token_ids, **options):
    """fused_linear_policy_loss with the identity as head, so that the hidden states are the logits."""
    return fused_linear_policy_loss(logits, torch.eye(logits.shape[-1]), token_ids, **options)


CALLS = pytest.mark.parametrize("call", [from_log_probs, fused_policy_loss, from_hidden])
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])


def mini_batch(layout):
    """(logits, token_ids, arguments). The logits have no poison in the padding, because from_log_probs reads it."""
    batch = random_batch(LENGTHS, vocab_size=17)
    logits, token_ids = (batch.lay_out(values, layout) for values in (batch.logits, batch.token_ids))
    return logits.nan_to_num(0.0), token_ids, batch.arguments(layout)


def run(call, logits, token_ids, **options):
    leaf = logits.clone().requires_grad_()
    out = call(leaf, token_ids, **options)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def micro_batches(values, parts):
    """A per-token tensor, split into the same parts."""
    return values.split([part.layout.shape[0] for part in parts])


@CALLS
@LAYOUTS
@pytest.mark.parametrize("preset", PRESETS)
def test_same_bits_as_the_arguments(call, layout, preset):
    logits, token_ids, arguments = mini_batch(layout)
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01)
    expected, expected_grad = run(call, logits, token_ids, config=config, **arguments)
    whole = PolicyLossInputs.prepare(token_ids, config=config, **arguments)
    for inputs in (whole, *whole.split(len(LENGTHS))):
        out, grad = run(call, logits, token_ids, inputs=inputs)
        assert torch.equal(grad, expected_grad)
        assert all(map(torch.equal, (out.loss, *out[2:]), (expected.loss, *expected[2:])))
        assert out.metrics.compute() == expected.metrics.compute()


@CALLS
@LAYOUTS
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["loss_agg_mode"])
@pytest.mark.parametrize("sizes", [1, 4, [1, 3, 2]], ids=str)
def test_micro_batches_sum_to_the_whole(call, layout, mode, sizes):
    """Losses and gradients add up for every weight of a token, also if a group spans micro-batches."""
    logits, token_ids, arguments = mini_batch(layout)
    config = PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01, **mode)
    expected, expected_grad = run(call, logits, token_ids, config=config, **arguments)
    parts = PolicyLossInputs.prepare(token_ids, config=config, **arguments).split(sizes)
    assert len(parts) == {"1": 6, "4": 2}.get(str(sizes), 3)
    pairs = zip(micro_batches(logits, parts), micro_batches(token_ids, parts), parts, strict=True)
    outputs, grads = zip(*(run(call, *of_part, inputs=inputs) for *of_part, inputs in pairs), strict=True)
    torch.testing.assert_close(sum(out.loss for out in outputs), expected.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat(grads), expected_grad, rtol=1e-6, atol=1e-8)
    metrics = outputs[0].metrics
    for out in outputs[1:]:
        metrics = metrics + out.metrics
    assert metrics.compute() == pytest.approx(expected.metrics.compute(), rel=1e-12)


def test_counts_of_several_ranks():
    """Two ranks with half of a mini-batch each need only its number of tokens."""
    logits, token_ids, arguments = mini_batch("padded")
    config = PolicyLossConfig(loss_agg_mode="token-mean")
    expected, _ = run(fused_policy_loss, logits, token_ids, config=config, **arguments)
    num_tokens = int(arguments["loss_mask"].sum())
    losses = []
    for rows in (slice(0, 3), slice(3, 6)):
        of_rank = {name: values[rows] for name, values in arguments.items()}
        inputs = PolicyLossInputs.prepare(token_ids[rows], config=config, num_tokens=num_tokens, **of_rank)
        parts = zip(inputs.split(2), logits[rows].split(2), token_ids[rows].split(2), strict=True)
        losses += [fused_policy_loss(*of_part, inputs=part).loss for part, *of_part in parts]
    torch.testing.assert_close(sum(losses), expected.loss)


@LAYOUTS
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["loss_agg_mode"])
@pytest.mark.parametrize("call", [fused_policy_loss, from_hidden])
def test_ignored_ids_are_out_of_the_loss(call, layout, mode):
    logits, token_ids, arguments = mini_batch(layout)
    arguments["loss_mask"] = arguments["loss_mask"].clone()
    chosen = arguments["loss_mask"] & (torch.arange(token_ids.numel()).view(token_ids.shape) % 3 == 0)
    assert bool(chosen.any())
    token_ids = token_ids.masked_fill(chosen, -100)
    config = PolicyLossConfig(**mode)
    expected, expected_grad = run(call, logits, token_ids, config=config, **arguments)
    inputs = PolicyLossInputs.prepare(token_ids, config=config, **arguments)
    out, grad = run(call, logits, token_ids, inputs=inputs)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad)
    assert not grad[chosen].any()


def test_ids_ignored_in_the_call_alone_have_no_gradient():
    logits, token_ids, arguments = mini_batch("packed")
    inputs = PolicyLossInputs.prepare(token_ids, **arguments)
    first = int(arguments["loss_mask"].nonzero()[0])
    token_ids[first] = -100
    out, grad = run(fused_policy_loss, logits, token_ids, inputs=inputs)
    expected, expected_grad = run(fused_policy_loss, logits, token_ids, **arguments)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad)
    assert out.metrics.compute() == expected.metrics.compute()


def test_shortened_rows():
    """A micro-batch may be padded to its own longest response."""
    logits, token_ids, arguments = mini_batch("padded")
    expected, expected_grad = run(fused_policy_loss, logits, token_ids, **arguments)
    part = PolicyLossInputs.prepare(token_ids, **arguments).shorten(9)
    out, grad = run(fused_policy_loss, logits[:, :9], token_ids[:, :9], inputs=part)
    torch.testing.assert_close(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad[:, :9])
    longest = int(arguments["loss_mask"].nonzero()[:, 1].max()) + 1
    with pytest.raises(ValueError, match=f"length is {longest - 1}: it must be at least {longest}"):
        part.shorten(longest - 1)


@CALLS
def test_arguments_stay_required(call):
    logits, token_ids, arguments = mini_batch("padded")
    del arguments["advantages"]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'advantages'"):
        call(logits, token_ids, **arguments)


@CALLS
@pytest.mark.parametrize("name", ["advantages", "loss_mask", "config", "num_tokens"])
def test_an_argument_beside_inputs_is_refused(call, name):
    logits, token_ids, arguments = mini_batch("padded")
    inputs = PolicyLossInputs.prepare(token_ids, **arguments)
    twice = {**arguments, "config": PolicyLossConfig(), "num_tokens": 3}[name]
    with pytest.raises(TypeError, match=f"{name} is given with inputs: it must be left out"):
        call(logits, token_ids, inputs=inputs, **{name: twice})


@CALLS
def test_inputs_of_other_tokens_are_refused(call):
    logits, token_ids, arguments = mini_batch("padded")
    part = PolicyLossInputs.prepare(token_ids, **arguments).split(4)[0]
    with pytest.raises(ValueError, match=r"inputs has the shape \(4, 10\): it must be \(6, 10\)"):
        call(logits, token_ids, inputs=part)
    with pytest.raises(TypeError, match="inputs is a dict: it must be a PolicyLossInputs"):
        call(logits, token_ids, inputs=arguments)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        (0, ValueError, "sizes has 0: a micro-batch must have at least 1 response"),
        ([4, 0, 2], ValueError, "sizes has 0"),
        ([4, 1], ValueError, "sizes sums to 5: it must be 6"),
        (2.0, TypeError, r"sizes has 2\.0: it must be integers"),
        ([True] * 6, TypeError, "sizes has True"),
    ],
)
def test_sizes_that_are_no_split(sizes, error, message):
    _, token_ids, arguments = mini_batch("padded")
    with pytest.raises(error, match=message):
        PolicyLossInputs.prepare(token_ids, **arguments).split(sizes)


def test_what_is_not_finite_raises_before_any_forward():
    _, token_ids, arguments = mini_batch("padded")
    arguments["old_log_probs"][3, 4] = math.nan
    arguments["loss_mask"][3, 4] = True
    with pytest.raises(ValueError, match="old_log_probs is nan at token 4 of response 3"):
        PolicyLossInputs.prepare(token_ids, **arguments)


@CALLS
def test_compiled(call):
    logits, token_ids, arguments = mini_batch("packed")
    parts = PolicyLossInputs.prepare(token_ids, config=PolicyLossConfig(entropy_coef=0.01), **arguments).split(3)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for *of_part, inputs in zip(micro_batches(logits, parts), micro_batches(token_ids, parts), parts, strict=True):
        (out, grad), (expected, expected_grad) = (run(f, *of_part, inputs=inputs) for f in (compiled, call))
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(grad, expected_grad)
    torch.compiler.reset()
