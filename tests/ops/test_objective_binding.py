"""The C++ objectives equal the Python objectives for all values that float32 can hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirl_kernels import PolicyLossConfig, fused_policy_loss
from minirl_kernels.ops.fused_policy_loss.cpu import forward_backward
from minirl_kernels.ops.fused_policy_loss.loss_rows import LossRows
from minirl_kernels.ops.policy_loss.inputs import prepare_inputs
from minirl_kernels.ops.policy_loss.objective_kernels import KERNELS
from minirl_kernels.ops.policy_loss.reference import token_losses
from minirl_kernels.ops.token_logprobs.rows import LogitRows

pytestmark = pytest.mark.usefixtures("cpu")

WITH_KERNEL = list(KERNELS.values())


def numbers(low, high):
    return st.floats(low, high, width=32)


# differences at which exp under- or overflows float32 and float64, and all values between
log_prob = st.one_of(
    numbers(-12, 0),
    numbers(-200, 0),
    numbers(-900, 0),
    st.sampled_from([0.0, -1e-7, -88.7, -95.0, -103.0, -104.0, -800.0, -1e4, -1e6]),
)
advantage = st.one_of(numbers(-3, 3), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e30]))
token = st.tuples(log_prob, log_prob, log_prob, log_prob, advantage)
ratio_low = st.one_of(numbers(0, 1), st.sampled_from([0.0, 0.25, 1.0]))
ratio_high = st.one_of(numbers(0, 2), st.sampled_from([0.0, 0.25]))
threshold = st.one_of(st.none(), numbers(0.125, 10), st.sampled_from([1.0, 5.0, 1e38, 1e300]))


SUMMED = {"loss_agg_mode": "seq-mean-token-sum"}


@st.composite
def config(draw):
    objective = draw(st.sampled_from(WITH_KERNEL))
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
    """[T, 2] logits whose first token has nearly these log-probabilities."""
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
    """log_probs, and (token_loss, token_grad) of C++ and of the reference, in a mode that never raises."""
    names = ("group_ids", "num_responses", "num_tokens", "num_groups")
    inputs = prepare_inputs(log_probs.shape, log_probs.device, raises=False, **dict.fromkeys(names), **arguments)
    logits, ids = rows_with(log_probs), torch.zeros(len(log_probs), dtype=torch.int64)
    rows = LogitRows(logits, ids, torch.ones(len(ids)))
    log_probs, _, *ours = forward_backward(rows, LossRows.of(inputs)[0], torch.empty_like(logits))
    return log_probs, ours, token_losses(log_probs, inputs)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(config=config(), tokens=st.lists(token, min_size=4, max_size=12))
def test_cpp_is_python(config, tokens):
    """Loss and c_t of each token are equal, or NaN in both, for any float32 values."""
    log_probs, old, mu, ref, advantages = torch.tensor(tokens, dtype=torch.float32).T.contiguous()
    log_probs, cpp, python = by_cpp(log_probs, one_response(old, mu, ref, advantages, config))
    # a ratio exactly at its bound may fall on either side, because the two exponentials are rounded differently
    r, d = (x.exp()[:, None] for x in (log_probs.double() - old, old.double() - mu))
    w = (log_probs.double() - mu).exp()[:, None]
    bounds = torch.tensor([1 - config.clip_ratio_low, 1 + config.clip_ratio_high], dtype=torch.float64)
    apart = ((r - bounds).abs() > 1e-12 * bounds).all(-1)
    if config.rollout_is_threshold is not None:
        limit = torch.tensor([config.rollout_is_threshold], dtype=torch.float64)
        apart &= (((d - limit).abs() > 1e-12 * limit) & ((w - limit).abs() > 1e-12 * limit)).all(-1)
    size = torch.stack([torch.stack(python), torch.stack(cpp)]).abs().amax((0, 1))
    for ours, theirs in zip(cpp, python, strict=True):
        # near the largest float32, either result may be infinite
        close = (ours - theirs).abs() <= 1e-6 * theirs.abs() + 2.0**-149
        near_the_end = size > 0.999 * torch.finfo(torch.float32).max
        assert bool((close | (ours.isnan() & theirs.isnan()) | near_the_end | ~apart).all()), (ours, theirs)


@pytest.mark.parametrize("overflowing", [95.0, 800.0])
@pytest.mark.parametrize("objective", ["reinforce", "grpo", "cispo"])
def test_both_say_which_token_overflows(objective, overflowing):
    config = PolicyLossConfig.preset(objective, clip=False, **SUMMED)
    old = torch.tensor([-0.5, -0.5 - overflowing, -0.5])
    arguments = one_response(old, old, old, -torch.ones(3), config)
    for shares in by_cpp(torch.full((3,), -0.5), arguments)[1:]:
        assert [values.isnan().tolist() for values in shares] == [[False, True, False]] * 2


@pytest.mark.parametrize("objective", WITH_KERNEL)
@pytest.mark.parametrize("far", [-200.0, -1e4, torch.finfo(torch.float32).min])
def test_overflow_without_advantage_is_zero(objective, far):
    """Every ratio is infinite, and its product with an advantage of 0 must be 0."""
    config = PolicyLossConfig.preset(objective, rollout_is="token", **SUMMED)
    gone = torch.full((2,), far)
    arguments = one_response(gone, gone, gone, torch.tensor([0.0, -0.0]), config)
    logits = rows_with(torch.tensor([-0.1, -3.0])).requires_grad_()
    out = fused_policy_loss(logits, torch.zeros(2, dtype=torch.int64), backend="cpu", **arguments)
    assert out.loss == 0
    assert torch.equal(out.token_grad, torch.zeros(2))


@pytest.mark.parametrize("advantage", [1.0, 0.0])
@pytest.mark.parametrize("objective", WITH_KERNEL)
def test_nan_is_not_repaired(objective, advantage):
    """A NaN must reach the caller: no comparison may replace it by a bound, and an advantage of 0 may not hide it."""
    config = PolicyLossConfig.preset(objective, rollout_is="token", **SUMMED)
    values = torch.tensor([-1.0, math.nan])
    arguments = one_response(values, values, values, torch.full((2,), advantage), config)
    for shares in by_cpp(torch.tensor([-1.0, -1.0]), arguments)[1:]:
        assert [share.isnan().tolist() for share in shares] == [[False, True]] * 2
    for backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=r"^old_log_probs is nan at token 1 of response 0"):
            fused_policy_loss(
                rows_with(values.nan_to_num(-1)), torch.zeros(2, dtype=torch.int64), backend=backend, **arguments
            )


@pytest.mark.parametrize("objective", ["minirl", "grpo", "cispo"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_ratio_at_its_bound_is_inside(objective, backend):
    """At r = d = w = 1 with every bound at 1, nothing is stopped or truncated, for both signs of advantage."""
    config = PolicyLossConfig(
        objective=objective, clip_ratio_low=0.0, clip_ratio_high=0.0, rollout_is="token", rollout_is_threshold=1.0
    )
    logits, ids = rows_with(torch.tensor([-1.0, -2.0])), torch.zeros(2, dtype=torch.int64)
    ones = torch.tensor([1.0, -1.0])
    blank = one_response(*[torch.zeros(2)] * 3, ones, config)
    now = fused_policy_loss(logits, ids, backend=backend, **blank).log_probs
    out = fused_policy_loss(logits.requires_grad_(), ids, backend=backend, **one_response(now, now, now, ones, config))
    assert out.token_grad.tolist() == [-1.0, 1.0]
