"""A loss that exceeds float32: the CPU names its token; elsewhere that token alone is NaN, and is counted."""

import math
from dataclasses import replace

import pytest
import torch
from exact_objective import FLOAT32_MAX, share
from policy_batches import PRESETS, TOKEN_LEVEL, every_config, random_batch

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss, fused_policy_loss, policy_loss
from minirl_kernels.ops.policy_loss.inputs import prepare_inputs
from minirl_kernels.ops.policy_loss.op import differentiable_loss

LARGEST = torch.finfo(torch.float32).max
# (log_prob, old, mu, ref): all log-ratios small; then large in either direction, one alone or several
TOKENS = [
    (-1.0, -1.25, -1.5, -1.125),
    *((-0.5, -0.5 - x, -0.5, -0.5) for x in (88.0, 95.0, 800.0, 1e6)),
    *((-0.5, -0.5, -0.5 - x, -0.5) for x in (88.0, 95.0, 800.0, LARGEST)),
    *((-0.5, -0.5 - x, -0.5 - x, -0.5) for x in (95.0, 800.0, LARGEST)),
    *((-0.5 - x, -0.5, -0.5, -0.5) for x in (95.0, 800.0, LARGEST)),
    *((-0.5, -x, -0.5, -0.5) for x in (95.0, 800.0)),
    (-1.0, -801.0, -1.5, -1.0),
    (-801.0, -801.25, -801.5, -801.0),
    (-95.0, -190.0, -95.5, -1.0),
]
ADVANTAGES = (1.0, -1.0, 0.0, 1e-4, -1e-4)


def arguments_of(tokens, config):
    """Responses of one token each."""
    old, mu, ref, advantages = torch.tensor([token[1:] for token in tokens], dtype=torch.float32).T.contiguous()
    return {
        "old_log_probs": old,
        "rollout_log_probs": mu,
        "ref_log_probs": ref,
        "advantages": advantages,
        "loss_mask": None,
        "cu_seqlens": torch.arange(len(tokens) + 1, dtype=torch.int32),
        "num_responses": 1,
        "config": config,
    }


def without_raising(log_probs, arguments):
    """policy_loss as it runs on a GPU, where it does not raise."""
    names = ("group_ids", "num_tokens", "num_groups")
    inputs = prepare_inputs(log_probs.shape, log_probs.device, raises=False, **dict.fromkeys(names), **arguments)
    return differentiable_loss(log_probs, None, inputs, None)


@pytest.mark.parametrize("kl", [(0.0, "k1"), (0.5, "k1"), (0.5, "k2"), (0.5, "k3")], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_finite_is_right_and_what_is_not_is_named(preset, kl):
    kl_coef, estimator = kl
    for config in every_config(loss_agg_mode="seq-mean-token-sum"):
        if config.objective != preset:
            continue
        config = replace(config, kl_coef=kl_coef, kl_estimator=estimator)
        tokens = [(*token, advantage) for token in TOKENS for advantage in ADVANTAGES]
        tokens = [tuple(torch.tensor(token, dtype=torch.float32).tolist()) for token in tokens]
        exact = [share(config, *token) for token in tokens]
        fits = [all(abs(x) <= FLOAT32_MAX for x in shares) for shares in exact]
        log_probs = torch.tensor([token[0] for token in tokens]).requires_grad_()
        out = without_raising(log_probs, arguments_of(tokens, config))
        (grad,) = torch.autograd.grad(out.loss, log_probs)
        assert out.token_loss.isfinite().tolist() == out.token_grad.isfinite().tolist() == fits
        assert torch.equal(grad.isfinite(), out.token_grad.isfinite())
        assert out.metrics.compute()["num_overflow_tokens"] == fits.count(False)
        for values, right in ((out.token_loss, [x for x, _ in exact]), (out.token_grad, [x for _, x in exact])):
            expected = torch.tensor([float(x) if abs(x) <= FLOAT32_MAX else math.nan for x in right])
            where = torch.tensor(fits)
            torch.testing.assert_close(values[where], expected.float()[where], rtol=1e-6, atol=1e-37)
        for index in [i for i, fit in enumerate(fits) if fit][:3]:  # each alone, which must not raise
            policy_loss(log_probs[[index]].detach(), **arguments_of([tokens[index]], config))
        if False in fits:
            with pytest.raises(ValueError, match=rf"overflows at token 0 of response {fits.index(False)}, with log_pr"):
                policy_loss(log_probs.detach(), **arguments_of(tokens, config))


@pytest.mark.parametrize(("preset", "advantage"), [("grpo", -1.0), ("gspo", -1.0), ("reinforce", 1.0)])
def test_one_log_ratio_of_95_does_not_touch_the_other_tokens(preset, advantage):
    batch = random_batch([3, 3], spread=0.1)
    batch.loss_mask[:], batch.advantages[:] = True, advantage
    config = PolicyLossConfig.preset(preset, loss_agg_mode="seq-mean-token-sum")
    arguments = {**batch.arguments("packed"), "config": config, "num_responses": 2}
    del arguments["group_ids"]
    leaf = batch.log_probs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(policy_loss(leaf, **arguments).loss, leaf)
    for name in ("old_log_probs", "rollout_log_probs"):
        arguments[name] = arguments[name].clone()
        arguments[name][4] -= 95 * (3 if preset == "gspo" else 1)
    out = without_raising(leaf, arguments)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    others = [0, 1, 2] if preset == "gspo" else [0, 1, 2, 3, 5]  # in GSPO the tokens of a response share a ratio
    assert torch.equal(grad[others], expected[others])
    assert grad[4].isnan()
    place = "token 0 of response 1" if preset == "gspo" else "token 1 of response 1"
    with pytest.raises(ValueError, match=rf"overflows at {place}, with log_probs .* must be finite in float32"):
        policy_loss(leaf, **arguments)


def test_a_sum_that_overflows_is_named_by_its_largest_token():
    log_probs = torch.tensor([-0.5, -0.5, -0.5])
    old = log_probs - torch.tensor([88.0, 88.6, 88.6])
    with pytest.raises(ValueError, match="overflows at token 1 of response 0"):
        policy_loss(
            log_probs,
            old_log_probs=old,
            rollout_log_probs=None,
            advantages=torch.tensor([-1.0]),
            loss_mask=None,
            cu_seqlens=torch.tensor([0, 3], dtype=torch.int32),
            config=PolicyLossConfig.grpo(loss_agg_mode="seq-mean-token-sum"),
        )


def overflowing_batch(preset, dtype=torch.float32):
    """A batch and a config with which token 1 of response 1 overflows, for any preset."""
    batch = random_batch([3, 4], vocab_size=40, dtype=dtype)
    batch.loss_mask[:], batch.advantages[:] = True, -1.0
    for values in (batch.old_log_probs, batch.rollout_log_probs):
        values[4] -= 500
    rollout_is = "token" if preset in TOKEN_LEVEL else "sequence"
    return batch, PolicyLossConfig.preset(
        preset, loss_agg_mode="seq-mean-token-sum", rollout_is=rollout_is, rollout_is_threshold=None, clip=False
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_fused_losses_name_the_token(preset, backend, cpu):
    batch, config = overflowing_batch(preset)
    place = "token 1 of response 1" if preset in TOKEN_LEVEL else "token 0 of response 1"
    for layout in ("packed", "padded"):
        logits, ids = (batch.lay_out(x, layout) for x in (batch.logits, batch.token_ids))
        leaf = logits.clone().requires_grad_()
        with pytest.raises(ValueError, match=f"overflows at {place}"):
            fused_policy_loss(leaf, ids, config=config, backend=backend, **batch.arguments(layout))
    hidden, weight = batch.logits.clone().requires_grad_(), torch.eye(40).requires_grad_()
    with pytest.raises(ValueError, match=f"overflows at {place}"):
        fused_linear_policy_loss(
            hidden, weight, batch.token_ids, config=config, backend=backend, **batch.arguments("packed")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_logits_that_were_to_be_overwritten_are_as_they_were(preset, dtype, cpu):
    batch, config = overflowing_batch(preset, dtype)
    before = batch.logits.clone()
    leaf = batch.logits.requires_grad_()
    with pytest.raises(ValueError, match="overflows at token"):
        fused_policy_loss(
            leaf, batch.token_ids, config=config, backend=cpu, overwrite_logits=True, **batch.arguments("packed")
        )
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_logits_survive_a_kl_term_that_overflows(preset, estimator, cpu):
    """The token's own log-probability causes the overflow, and only the logits show it."""
    batch = random_batch([3, 4], vocab_size=9000, spread=0.1)
    batch.logits[4] = torch.where(torch.arange(9000) == batch.token_ids[4], -1e25, batch.logits[4])
    before, leaf = batch.logits.clone(), batch.logits.requires_grad_()
    batch.loss_mask[:] = True
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, kl_estimator=estimator, loss_agg_mode="seq-mean-token-sum")
    with pytest.raises(ValueError, match="overflows at token 1 of response 1"):
        fused_policy_loss(
            leaf, batch.token_ids, config=config, backend=cpu, overwrite_logits=True, **batch.arguments("packed")
        )
    assert torch.equal(leaf.detach(), before)


@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_a_large_ratio_that_is_bounded_overwrites_as_ever(preset, cpu):
    """A large ratio is truncated, clipped, or multiplied by an advantage of 0.

    The check before the overwriting must find it finite.
    """
    batch = random_batch([3, 4], vocab_size=40)
    batch.loss_mask[:] = True
    batch.advantages[:] = torch.tensor([1.0, 0.0])
    for values in (batch.old_log_probs, batch.rollout_log_probs):
        values[[1, 4]] -= 300
    config = PolicyLossConfig.preset(
        preset, loss_agg_mode="seq-mean-token-sum", rollout_is="token", rollout_is_threshold=5.0
    )
    results = []
    for overwrite in (False, True):
        leaf = batch.logits.clone().requires_grad_()
        out = fused_policy_loss(
            leaf, batch.token_ids, config=config, backend=cpu, overwrite_logits=overwrite, **batch.arguments("packed")
        )
        (grad,) = torch.autograd.grad(out.loss, leaf)
        assert out.metrics.compute()["num_overflow_tokens"] == 0
        results.append((out.loss.detach(), grad))
    assert all(map(torch.equal, *results))
    assert results[0][0].isfinite()


def test_compiled_code_names_the_token(cpu):
    batch, _ = overflowing_batch("grpo")
    arguments, config = batch.arguments("packed"), PolicyLossConfig.grpo()
    compiled = torch.compile(
        lambda old: (
            fused_policy_loss(
                batch.logits, batch.token_ids, config=config, backend=cpu, **{**arguments, "old_log_probs": old}
            ).loss
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    fine = arguments["old_log_probs"].clone()
    fine[4] += 500
    assert compiled(fine).isfinite()
    with pytest.raises(ValueError, match="overflows at token 1 of response 1"):
        compiled(arguments["old_log_probs"])
