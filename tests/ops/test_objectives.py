"""Objectives given as classes: the examples equal the equations of their papers, in every loss."""

import math

import equations
import pytest
import torch
from own_objectives import EXAMPLES, Ascent, Squared, SquaredOfMean, SquaredOfResponse, example_loss
from policy_batches import assert_as_exact_as_eager, per_row, random_batch

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss, fused_policy_loss, policy_loss
from minirl_kernels.objectives import CISPO, GRPO, NAMED, MiniRL, TokenRatios

LENGTHS = [5, 1, 3, 8]


def config_of(name, **changes):
    return PolicyLossConfig.preset(EXAMPLES[name], **changes)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_its_equation(name, corrected, layout):
    """Loss and derivative agree in float64, for tokens on every side of every bound."""
    changes = {"rollout_is": "token"} if corrected or name.startswith("dppo") else {}
    config = config_of(name, loss_agg_mode="seq-mean-token-mean", **changes)
    batch = random_batch([60, 1, 5, 80], spread=1.2)
    batch.rollout_log_probs.clamp_(max=-0.01)  # DPPO needs probabilities below 1
    exact = batch.log_probs.double().requires_grad_()
    expected = example_loss(name, config, exact, batch)
    (expected_grad,) = torch.autograd.grad(expected, exact)
    leaf = batch.lay_out(batch.log_probs, layout).requires_grad_()
    out = policy_loss(leaf, config=config, **batch.arguments(layout))
    (grad,) = torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(out.loss.detach().double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(batch.pack(grad, layout).double(), expected_grad, rtol=1e-6, atol=1e-12)
    computed = out.metrics.compute()
    if name == "sapo":
        assert computed["clip_fraction_high"] == computed["clip_fraction_low"] == 0
    else:
        assert computed["clip_fraction_high"] > 0.05
        assert computed["clip_fraction_low"] > 0.02


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_fused_losses_run_an_example(name, backend):
    config = config_of(name)
    batch = random_batch(LENGTHS, vocab_size=40, spread=0.8)
    batch.rollout_log_probs.clamp_(max=-0.01)

    def by_equations(dtype):
        leaf = batch.logits.to(dtype).requires_grad_()
        loss = example_loss(name, config, equations.token_log_probs(leaf, batch.token_ids)[0], batch)
        return torch.autograd.grad(loss, leaf)[0]

    exact, eager = by_equations(torch.float64), by_equations(torch.float32)
    leaf = batch.logits.clone().requires_grad_()
    out = fused_policy_loss(leaf, batch.token_ids, config=config, backend=backend, **batch.arguments("packed"))
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert_as_exact_as_eager(grad, eager, exact, per_row(exact))
    hidden, weight = batch.logits.clone().requires_grad_(), torch.eye(40).requires_grad_()
    out = fused_linear_policy_loss(
        hidden, weight, batch.token_ids, config=config, backend=backend, **batch.arguments("packed")
    )
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    assert_as_exact_as_eager(grads[0], eager, exact, per_row(exact))
    assert_as_exact_as_eager(grads[1], eager.mT @ batch.logits, exact.mT @ batch.logits.double())


@pytest.mark.parametrize("rollout_is", [None, "token", "sequence"])
@pytest.mark.parametrize("objective", [Squared(), SquaredOfResponse(), SquaredOfMean()], ids=repr)
def test_a_class_of_ones_own_at_every_level(objective, rollout_is):
    """The gradient is the derivative of the class's loss, times the correction, which the library applies."""
    threshold = None if rollout_is is None else 1.5
    config = PolicyLossConfig(objective=objective, rollout_is=rollout_is, rollout_is_threshold=threshold)
    batch = random_batch(LENGTHS, spread=0.4)
    log_probs = batch.log_probs.double().requires_grad_()
    losses = []
    for start, end in batch.spans():
        tokens = [t for t in range(start, end) if batch.loss_mask[t]]
        if not tokens:
            continue
        old, mu = (values.double()[tokens] for values in (batch.old_log_probs, batch.rollout_log_probs))
        log_r, log_d = log_probs[tokens] - old, old - mu
        if objective.level == "sequence":
            log_r = log_r.sum(0, keepdim=True)
        if objective.level == "sequence_mean":  # the token form, which has the derivative of the response
            log_r = log_r.mean().detach() + log_r - log_r.detach()
        if rollout_is == "sequence":
            log_d = log_d.sum().expand(len(tokens))
        d = torch.ones(len(tokens)) if rollout_is is None else log_d.exp().clamp(max=1.5)
        advantages = batch.token_advantages().double()[tokens]
        terms = -objective.scale * (2 * log_r).exp() * advantages[: len(log_r)]
        if objective.level == "sequence":  # d_t multiplies the derivative by token t
            here = (log_probs[tokens] - log_probs[tokens].detach()).exp()
            terms = terms.detach() * d * (1 / len(tokens) + here.square() - 1)
        else:
            terms = terms * d
        losses.append(terms.sum())
    expected = torch.stack(losses).sum() / len(LENGTHS)
    (expected_grad,) = torch.autograd.grad(expected, log_probs)
    out = policy_loss(batch.log_probs, config=config, **batch.arguments("packed"))
    torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.token_grad.double(), expected_grad, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("objective", [*EXAMPLES.values(), Squared()], ids=repr)
def test_no_advantage_is_no_loss_and_nan_stays_nan(objective):
    """This holds for infinite ratios in both directions. A NaN must reach the caller."""
    log_prob = torch.tensor([-1.0, -900.0, -1.0, -1.0], dtype=torch.float64)
    log_r = log_prob - torch.tensor([-900.0, -1.0, -1.0, math.nan])
    zeros = torch.zeros_like(log_r)
    for values in objective.loss(TokenRatios(log_prob, log_r, log_r, zeros, zeros)):
        assert values[:3].tolist() == [0, 0, 0]
        assert values[3].isnan()


def test_a_class_without_bounds_clips_nothing():
    """A class without bounds does not count as clipped at the bounds of the config."""
    batch = random_batch(LENGTHS, spread=1.5)
    out = policy_loss(batch.log_probs, config=PolicyLossConfig(objective=Squared()), **batch.arguments("packed"))
    computed = out.metrics.compute()
    assert computed["clip_fraction_high"] == computed["clip_fraction_low"] == 0
    assert computed["truncation_fraction"] > 0


def test_the_bounds_of_a_class_are_counted():
    batch = random_batch(LENGTHS, spread=0.8)
    config = config_of("two_sided", loss_agg_mode="token-mean")
    computed = policy_loss(batch.log_probs, config=config, **batch.arguments("packed")).metrics.compute()
    r = (batch.log_probs.double() - batch.old_log_probs.double()).exp()[batch.loss_mask]
    positive = (batch.token_advantages() > 0)[batch.loss_mask]
    above = torch.where(positive, r > 1.27, r > 2.0)
    assert computed["clip_fraction_high"] == above.double().mean() > 0
    assert computed["clip_fraction_low"] == ((r < 0.8) & ~positive).double().mean() > 0


@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_a_class_derived_from_one_with_a_kernel_keeps_its_own_loss(call, cpu):
    batch = random_batch(LENGTHS, vocab_size=40)
    grads = []
    for objective in (GRPO(), Ascent()):
        leaf = batch.logits.clone().requires_grad_()
        arguments = {"config": PolicyLossConfig.preset(objective), "backend": cpu, **batch.arguments("packed")}
        if call == "logits":
            out = fused_policy_loss(leaf, batch.token_ids, **arguments)
        else:
            out = fused_linear_policy_loss(leaf, torch.eye(40), batch.token_ids, **arguments)
        grads += torch.autograd.grad(out.loss, leaf)
    assert grads[0].any()
    torch.testing.assert_close(grads[0], -grads[1])


@pytest.mark.parametrize("name", NAMED)
def test_an_instance_is_the_objective_of_that_name(name, cpu):
    batch = random_batch(LENGTHS, vocab_size=40, spread=0.8)
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4} if hasattr(NAMED[name], "clip_ratio_low") else {}
    by_name = PolicyLossConfig.preset(name, **bounds)
    by_class = PolicyLossConfig.preset(NAMED[name](**bounds))
    results = []
    for config in (by_name, by_class):
        leaf = batch.logits.clone().requires_grad_()
        out = fused_policy_loss(leaf, batch.token_ids, config=config, backend=cpu, **batch.arguments("packed"))
        results.append((out.loss.detach(), out.token_grad, out.metrics.sums, *torch.autograd.grad(out.loss, leaf)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("objective", [Squared(), SquaredOfMean(), EXAMPLES["dppo_kl"], MiniRL(), CISPO()], ids=repr)
def test_compiled_without_a_graph_break(objective, cpu):
    batch = random_batch(LENGTHS, vocab_size=40)
    config = PolicyLossConfig.preset(objective, loss_agg_mode="token-mean")
    arguments = batch.arguments("packed")

    def losses(log_probs, logits, hidden, weight):
        return (
            policy_loss(log_probs, config=config, **arguments).loss,
            fused_policy_loss(logits, batch.token_ids, config=config, backend=cpu, **arguments).loss,
            fused_linear_policy_loss(hidden, weight, batch.token_ids, config=config, backend=cpu, **arguments).loss,
        )

    results = []
    for call in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        leaves = [
            leaf.clone().requires_grad_() for leaf in (batch.old_log_probs, batch.logits, batch.logits, torch.eye(40))
        ]
        outputs = call(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(outputs), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
