"""The objectives are written once per language: C++ against Python, over everything that float32 can hold."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_kernels import PolicyLossConfig, fused_policy_loss, policy_loss

pytestmark = pytest.mark.usefixtures("cpu")


def numbers(low, high):
    return st.floats(low, high, width=32)


# where exp of a difference under- and overflows float32, and everything between
log_prob = st.one_of(numbers(-12, 0), numbers(-200, 0), st.sampled_from([0.0, -1e-7, -88.7, -103.0, -104.0, -1e4]))
advantage = st.one_of(numbers(-3, 3), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e30]))
token = st.tuples(log_prob, log_prob, log_prob, log_prob, advantage)
ratio_low = st.one_of(numbers(0, 1), st.sampled_from([0.0, 0.25, 1.0]))
ratio_high = st.one_of(numbers(0, 2), st.sampled_from([0.0, 0.25]))
threshold = st.one_of(st.none(), numbers(0.125, 10), st.sampled_from([1.0, 5.0, 1e38]))


SUMMED = {"loss_agg_mode": "seq-mean-token-sum"}


@st.composite
def config(draw):
    objective = draw(st.sampled_from(["minirl", "reinforce", "grpo", "cispo"]))
    rollout_is = draw(st.sampled_from(["token", None]))
    truncates = rollout_is is not None or objective in ("minirl", "reinforce")
    return PolicyLossConfig(
        objective=objective,
        clip=draw(st.booleans()) and objective != "reinforce",
        clip_ratio_low=draw(ratio_low),
        clip_ratio_high=draw(ratio_high),
        rollout_is=rollout_is,
        rollout_is_threshold=draw(threshold) if truncates else None,
        kl_coef=draw(st.sampled_from([0.0, 0.5, 3.0])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        **SUMMED,
    )


def rows_with(log_probs):
    """[T, 2] logits whose first token has about these log-probabilities."""
    first = log_probs.double()
    other = torch.log(-torch.expm1(first)).clamp(min=-40)
    return torch.stack([first, other], -1).float()


def one_response(old, mu, ref, advantages, config):
    return {
        "old_log_probs": old,
        "rollout_log_probs": mu,
        "ref_log_probs": ref,
        "advantages": advantages,
        "loss_mask": None,
        "cu_seqlens": torch.tensor([0, len(old)], dtype=torch.int32),
        "config": config,
    }


def by_cpp(log_probs, arguments):
    logits = rows_with(log_probs).requires_grad_()
    ids = torch.zeros(len(log_probs), dtype=torch.int64)
    return fused_policy_loss(logits, ids, backend="cpu", **arguments)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(config=config(), tokens=st.lists(token, min_size=4, max_size=12))
def test_cpp_is_python(config, tokens):
    """The same loss and c_t of each token, to what rounding a log-ratio to float32 does to its exponential."""
    log_probs, old, mu, ref, advantages = torch.tensor(tokens, dtype=torch.float32).T.contiguous()
    arguments = one_response(old, mu, ref, advantages, config)
    cpp = by_cpp(log_probs, arguments)
    python = policy_loss(cpp.log_probs, **arguments)
    without_kl = policy_loss(cpp.log_probs, **{**arguments, "config": replace(config, kl_coef=0.0)})

    log_prob = cpp.log_probs.double()
    log_r, log_w, log_d, gap = log_prob - old, log_prob - mu, old.double() - mu, ref - log_prob
    ratios = torch.stack([log_r, log_w, log_d, gap])
    bounds = torch.tensor([1 - config.clip_ratio_low, 1 + config.clip_ratio_high], dtype=torch.float64)
    # C++ decides in float32 which side of a bound r is on
    on_one_side = ((log_r.exp()[:, None] - bounds).abs() > 1e-5 * bounds).all(-1)
    subnormal = (ratios > -105) & (ratios < -87)  # its float32 has hardly a digit to agree in
    # and no float32 overflows on the way to a finite product
    compared = on_one_side & (ratios.amax(0) < 80) & ~subnormal.any(0)
    precision = 2.0**-22 * (1 + ratios.abs().amax(0))
    for name in ("token_loss", "token_grad"):
        ours, theirs, policy = (getattr(out, name).double()[compared] for out in (cpp, python, without_kl))
        size = policy.abs() + config.kl_coef * (gap.exp() + gap.abs() + 1)[compared]
        close = (ours - theirs).abs() <= precision[compared] * size + 1e-37
        assert bool((close | (ours == theirs)).all()), (name, ours, theirs)


@pytest.mark.parametrize("objective", ["minirl", "reinforce", "grpo", "cispo"])
@pytest.mark.parametrize("far", [-200.0, -1e4, -math.inf])
def test_overflow_without_advantage_is_zero(objective, far):
    """Every ratio is infinite, and 0 times it is 0."""
    log_probs = torch.tensor([-0.1, -3.0])
    config = PolicyLossConfig.preset(objective, rollout_is="token", **SUMMED)
    gone = torch.full((2,), far)
    out = by_cpp(log_probs, one_response(gone, gone, gone, torch.tensor([0.0, -0.0]), config))
    assert out.loss == 0
    assert torch.equal(out.token_grad, torch.zeros(2))


@pytest.mark.parametrize("objective", ["minirl", "reinforce", "grpo", "cispo"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_is_not_repaired(objective, backend):
    """A NaN in a token that counts is the caller's to find: no comparison may turn it into a bound."""
    config = PolicyLossConfig.preset(objective, rollout_is="token", **SUMMED)
    values = torch.tensor([-1.0, math.nan])
    arguments = one_response(values, values, values, torch.tensor([1.0, 1.0]), config)
    logits = rows_with(torch.tensor([-1.0, -1.0])).requires_grad_()
    out = fused_policy_loss(logits, torch.zeros(2, dtype=torch.int64), backend=backend, **arguments)
    assert out.token_loss.isnan().tolist() == [False, True]
    assert out.token_grad.isnan().tolist() == [False, True]


@pytest.mark.parametrize("objective", ["minirl", "grpo", "cispo"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_ratio_at_its_bound_is_inside(objective, backend):
    """r = d = w = 1 with every bound at 1: neither stopped nor truncated, for either sign of advantage."""
    config = PolicyLossConfig(
        objective=objective, clip_ratio_low=0.0, clip_ratio_high=0.0, rollout_is="token", rollout_is_threshold=1.0
    )
    logits, ids = rows_with(torch.tensor([-1.0, -2.0])), torch.zeros(2, dtype=torch.int64)
    ones = torch.tensor([1.0, -1.0])
    blank = one_response(*[torch.zeros(2)] * 3, ones, config)
    now = fused_policy_loss(logits, ids, backend=backend, **blank).log_probs
    out = fused_policy_loss(logits.requires_grad_(), ids, backend=backend, **one_response(now, now, now, ones, config))
    assert out.token_grad.tolist() == [-1.0, 1.0]
