"""The Triton kernel of fused_policy_loss in Triton's interpreter: values and masks; hardware is not tested."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
import triton_cases
from dtypes import DTYPES
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policy_batches import TOKEN_LEVEL, batch_at_bounds, random_batch
from triton_cases import check_fused_policy_loss, random_logits, variants
from verify import bounds, traffic
from verify.interpreter import recording
from verify.launches import captured

from minirl_kernels import PolicyLossConfig, fused_policy_loss
from minirl_kernels.common.triton.scale import scale_in_place
from minirl_kernels.ops.fused_policy_loss.loss_rows import LossRows
from minirl_kernels.ops.fused_policy_loss.triton import forward_backward, launch_config
from minirl_kernels.ops.policy_loss import reference
from minirl_kernels.ops.policy_loss.kernels_objective import kl_penalty, token_objective
from minirl_kernels.ops.token_logprobs.rows import LogitRows

pytestmark = triton_cases.interpreter_only()

LENGTHS = [3, 1, 2, 4]


def call(logits, token_ids, *, out=None, **changes):
    """(results, gradient) of MiniRL; options that are not in `changes` have no effect on the loss."""
    ones = torch.ones(token_ids.shape)
    loss = LossRows(
        old_log_probs=None,
        behaviour_log_probs=None,
        ref_log_probs=None,
        advantages=ones,
        weights=ones,
        objective="minirl",
        clip=True,
        ratio_low=0.8,
        ratio_high=1.27,
        threshold=5.0,
        kl_coef=0.0,
        kl_estimator="k3",
        entropy_coef=0.0,
    )
    out = torch.empty_like(logits) if out is None else out
    return *forward_backward(LogitRows(logits, token_ids, ones), loss._replace(**changes), out), out


@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_every_option(preset):
    for seed, config in enumerate(variants(PolicyLossConfig.preset(preset, loss_agg_mode="token-mean"))):
        batch = random_batch(LENGTHS, vocab_size=33, seed=seed)
        check_fused_policy_loss(batch, config)
        check_fused_policy_loss(replace(batch, old_log_probs=None), config)


@pytest.mark.parametrize(
    ("preset", "rollout_is"),
    [("minirl", "token"), ("minirl", "sequence"), ("minirl", None), ("grpo", "token"), ("cispo", "token")],
)
def test_either_side_of_every_bound(preset, rollout_is):
    config = PolicyLossConfig.preset(preset, rollout_is=rollout_is, loss_agg_mode="token-mean")
    if rollout_is is not None or config.weighs_by_w:
        config = replace(config, rollout_is_threshold=5.0)
    check_fused_policy_loss(batch_at_bounds(config, vocab_size=17), config)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype, layout, overwrite):
    batch = random_batch(LENGTHS, vocab_size=257, dtype=dtype)
    config = PolicyLossConfig(entropy_coef=0.01)
    check_fused_policy_loss(batch, config, layout=layout, overwrite=overwrite)


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 1000, 1024, 4097])
def test_any_vocabulary(vocab_size):
    check_fused_policy_loss(random_batch([2, 3], vocab_size=vocab_size), PolicyLossConfig(entropy_coef=0.01))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [20_011, 40_000], ids=["odd", "aligned"])
def test_rows_of_many_tiles(vocab_size, dtype, overwrite):
    batch = random_batch([2, 2], vocab_size=vocab_size, dtype=dtype)
    check_fused_policy_loss(batch, PolicyLossConfig(entropy_coef=0.01), overwrite=overwrite)


@pytest.mark.parametrize("preset", ["gspo", "sequence_is"])
def test_two_phases(preset):
    batch = random_batch(LENGTHS, vocab_size=33)
    for overwrite in (False, True):
        check_fused_policy_loss(batch, PolicyLossConfig.preset(preset, entropy_coef=0.01), overwrite=overwrite)


@triton.jit
def objective_kernel(
    log_prob, log_r, log_w, log_d, advantage, ref, loss, grad, kl, kl_grad,
    low, high, threshold, OBJECTIVE: tl.constexpr, CLIP: tl.constexpr, ESTIMATOR: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, N)
    b_log_prob = tl.load(log_prob + o)
    b_loss, b_grad = token_objective(
        b_log_prob,
        tl.load(log_r + o),
        tl.load(log_w + o),
        tl.load(log_d + o),
        tl.load(advantage + o),
        low,
        high,
        0.0,
        0.0,
        threshold,
        OBJECTIVE,
        CLIP,
    )
    b_kl, b_kl_grad = kl_penalty(1.0, b_log_prob, tl.load(ref + o), ESTIMATOR)
    tl.store(loss + o, b_loss)
    tl.store(grad + o, b_grad)
    tl.store(kl + o, b_kl)
    tl.store(kl_grad + o, b_kl_grad)


LOG_PROBS = st.one_of(st.floats(-40, 0, width=32), st.just(-math.inf))
FAR = [85.0, 95.0, -95.0, 200.0, -200.0, 800.0, -800.0]
LOG_RATIOS = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([0.0, *FAR, math.inf, -math.inf]))
ADVANTAGES = st.one_of(st.floats(-8, 8, width=16), st.sampled_from([0.0, -0.0, 1e-4, -1e-4]))
GAPS = st.one_of(st.floats(-4, 4, width=32), st.sampled_from(FAR))
TOKEN = st.tuples(LOG_PROBS, LOG_RATIOS, LOG_RATIOS, LOG_RATIOS, ADVANTAGES, GAPS)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    objective=st.sampled_from(TOKEN_LEVEL),
    clip=st.booleans(),
    low=st.floats(0, 1, width=16),
    high=st.floats(0, 4, width=16),
    threshold=st.one_of(st.none(), st.floats(0.5, 10, width=16)),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    tokens=st.lists(TOKEN, min_size=8, max_size=8),
)
def test_the_objective_is_that_of_the_reference(objective, clip, low, high, threshold, estimator, tokens):
    config = PolicyLossConfig.preset(
        objective,
        clip=clip and objective != "reinforce",
        clip_ratio_low=low,
        clip_ratio_high=high,
        rollout_is="token",
        rollout_is_threshold=threshold,
    )
    log_prob, log_r, log_w, log_d, advantage, gap = torch.tensor(tokens, dtype=torch.float32).T.contiguous()
    log_r, log_w = (ratio.where(log_prob > -math.inf, -math.inf) for ratio in (log_r, log_w))
    log_d = log_d.where(log_prob > -math.inf, 0.0)  # else float32 would multiply 0 by infinity
    r = log_r.double().exp()
    # rounding may move a ratio across a bound that is this close
    assume(all(((r - bound).abs() > 1e-5).all() for bound in (1 - low, 1 + high)))
    ref = log_prob + gap
    results = [torch.empty(8) for _ in range(4)]
    objective_kernel[(1,)](
        log_prob, log_r, log_w, log_d, advantage, ref, *results,
        1 - low, 1 + high, math.inf if threshold is None else threshold,
        OBJECTIVE=objective, CLIP=config.clip, ESTIMATOR=estimator, N=8,
    )  # fmt: skip
    log_prob, log_r, log_w, log_d, advantage, ref = (
        values.double() for values in (log_prob, log_r, log_w, log_d, advantage, ref)
    )
    expected = reference.token_objective(log_prob, log_r, log_w, log_d, advantage, config)
    expected += reference.kl_penalty(log_prob, ref, estimator)
    for ours, theirs in zip(results, expected, strict=True):
        # infinite exactly where the result exceeds float32
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("preset", [*TOKEN_LEVEL, "gspo"])
def test_a_token_that_overflows_or_is_no_number_is_nan_alone(preset):
    """A token that overflows or is NaN does not affect others.

    With check=True it raises before any logits are overwritten.
    """
    batch = random_batch(LENGTHS, vocab_size=20, spread=0.1)
    batch.loss_mask[:], batch.advantages[:] = True, -1.0
    sequence = preset == "gspo"
    config = PolicyLossConfig.preset(
        preset, clip=False, loss_agg_mode="seq-mean-token-sum", rollout_is=None, rollout_is_threshold=None
    )

    def run(batch, **options):
        leaf = batch.logits.clone().requires_grad_()
        arguments = {**batch.arguments("packed"), "config": config, "backend": "triton", **options}
        out = fused_policy_loss(leaf, batch.token_ids, **arguments)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    _, expected = run(batch)
    others = torch.ones(10, dtype=torch.bool)
    others[3 if sequence else 4] = False
    place = "token 0 of response 1" if sequence else "token 0 of response 2"
    for wrong, named in ((-1e3, f"the loss overflows at {place}"), (math.nan, f"old_log_probs is nan at {place}")):
        old = batch.old_log_probs.clone()
        old[~others] = wrong
        bad = replace(batch, old_log_probs=old)
        out, grad = run(bad)
        assert grad[~others].isnan().all()
        assert torch.equal(grad[others], expected[others])
        assert out.loss.isnan()
        assert out.metrics.compute()["num_overflow_tokens"] == 1
        before = bad.logits.clone()
        with pytest.raises(ValueError, match=named):
            fused_policy_loss(
                bad.logits.requires_grad_(), bad.token_ids, config=config, backend="triton", check=True,
                overwrite_logits=True, **bad.arguments("packed")
            )  # fmt: skip
        assert torch.equal(bad.logits.detach(), before)
        bad.logits.requires_grad_(False)


def test_k3_of_policies_that_hardly_differ():
    """exp(x) - 1 - x is about x**2 / 2 for small x, far below the rounding error of its terms."""
    gap = torch.tensor([1e-4, -1e-4, 1e-3, -0.01, 0.3, -0.499, 0.501, -3.0])
    zeros, results = torch.zeros(8), [torch.empty(8) for _ in range(4)]
    objective_kernel[(1,)](
        *[zeros] * 5, gap, *results, 0.8, 1.2, 5.0, OBJECTIVE="minirl", CLIP=True, ESTIMATOR="k3", N=8
    )
    exact = gap.double().expm1() - gap.double()
    torch.testing.assert_close(results[2].double(), exact, rtol=1e-6, atol=0)


def test_masked_tokens_whose_ratio_overflows():
    """A ratio that overflows in the padding would give inf * 0 = NaN in the loss and the gradient."""
    batch = random_batch([3, 3], vocab_size=20)
    batch.loss_mask[:] = torch.tensor([1, 1, 0, 0, 1, 1], dtype=torch.bool)
    expected = check_fused_policy_loss(batch, PolicyLossConfig())
    for name in ("old_log_probs", "rollout_log_probs"):
        for garbage in (-1e30, math.nan, math.inf):
            values = getattr(batch, name).clone()
            values[2:4] = garbage
            results = check_fused_policy_loss(replace(batch, **{name: values}), PolicyLossConfig())
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_zero_advantage_and_an_infinite_weight():
    logits, token_ids = random_logits(2, 40), torch.tensor([3, 4])
    results = call(
        logits,
        token_ids,
        behaviour_log_probs=torch.full((2,), -math.inf),
        advantages=torch.tensor([0.0, 1.0]),
        threshold=math.inf,
    )
    assert not results[2][0]
    assert not results[3][0]
    assert not results[4][0].any()
    assert all(values[1].isnan().all() for values in results[2:])


def test_rows_without_gradient_are_not_read_a_second_time():
    logits, token_ids = random_logits(4, 20_000), torch.tensor([1, 2, 3, 4])
    with recording() as launches:
        *_, token_grad, grad = call(logits, token_ids, advantages=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert token_grad.count_nonzero() == 1
    assert [row.any().item() for row in grad] == [False, True, False, False]
    moved = traffic.traffic(*launches)
    row, tile = 20_000 * 4, launch_config(20_000, torch.float32).tile * 4
    assert 4 * row + (row - tile) <= moved.loaded < 4 * row + row


def test_stopped_tokens_keep_their_entropy_gradient():
    logits, token_ids = random_logits(1, 50), torch.tensor([3])
    *_, token_grad, grad = call(logits, token_ids, advantages=torch.zeros(1), entropy_coef=0.1)
    assert not token_grad.any()
    leaf = logits.requires_grad_()
    log_p = leaf.log_softmax(-1)
    (expected,) = torch.autograd.grad(0.1 * (log_p.exp() * log_p).sum(), leaf)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("finite", [slice(0, 300), slice(700, 1000), slice(9_000, 9_010)], ids=str)
def test_logits_of_minus_infinity(finite):
    vocab_size = 1000 if finite.stop <= 1000 else 20_000
    logits, token_ids = random_logits(3, vocab_size), torch.tensor([finite.start, finite.stop - 1, -100])
    outside = torch.ones(vocab_size, dtype=torch.bool)
    outside[finite] = False
    alone = call(logits[:, finite].contiguous(), token_ids - finite.start * (token_ids >= 0), entropy_coef=0.1)
    logits[:, outside] = -math.inf
    *results, grad = call(logits, token_ids, entropy_coef=0.1)
    for values, others in zip((*results, grad[:, finite]), alone, strict=True):
        torch.testing.assert_close(values, others)
    assert not grad[:, outside].any()


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, -1e4), (torch.float32, 1e4), (torch.bfloat16, -1e4)])
def test_all_logits_far_from_zero(dtype, offset):
    batch = random_batch(LENGTHS, vocab_size=1025)
    batch = replace(batch, logits=(batch.logits + offset).to(dtype))
    check_fused_policy_loss(batch, PolicyLossConfig(entropy_coef=0.01))


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_an_id_out_of_range_is_nan_and_reads_nothing(bad, advantage):
    logits, token_ids = random_logits(3, 40), torch.tensor([3, 7, 5])
    advantages = torch.tensor([1.0, advantage, 1.0])
    expected = call(logits, token_ids, advantages=advantages)
    token_ids[1] = bad
    with recording() as launches:
        results = call(logits, token_ids, advantages=advantages)
    assert bounds.outside(launches[0]) == []
    for values, others in zip(results, expected, strict=True):
        assert values[1].isnan().all()
        assert torch.equal(values[[0, 2]], others[[0, 2]])


def test_a_second_backward_says_that_the_gradient_is_gone():
    batch = random_batch(LENGTHS, vocab_size=20)
    logits = batch.logits.clone().requires_grad_()
    out = fused_policy_loss(logits, batch.token_ids, backend="triton", **batch.arguments("packed"))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="fused_policy_loss made its gradient in the forward"):
        out.loss.backward()


def test_zero_tokens():
    logits = torch.zeros(0, 7)
    assert [tuple(v.shape) for v in call(logits, torch.zeros(0, dtype=torch.int64))] == [(0,)] * 4 + [(0, 7)]


def test_the_bits_of_a_row_do_not_depend_on_its_batch():
    """A program of the kernel reads its own row only."""
    logits, token_ids = random_logits(5, 999, dtype=torch.bfloat16), torch.arange(5)
    together = call(logits, token_ids, entropy_coef=0.1)
    for row in range(5):
        alone = call(logits[row : row + 1], token_ids[row : row + 1], entropy_coef=0.1)
        assert all(torch.equal(values[row : row + 1], one) for values, one in zip(together, alone, strict=True))


def test_more_tokens_than_a_grid_axis_but_the_first_can_count():
    with captured() as launches:
        call(torch.zeros(70_000, 16), torch.zeros(70_000, dtype=torch.int64))
    assert [launch.grid for launch in launches] == [(70_000,)]


def test_rows_more_than_2_to_the_31_elements_apart():
    """The memory between the rows is never touched, so the system need not provide it."""
    stride = 2**31 + 48
    logits = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    logits.copy_(random_logits(2, 40, dtype=torch.bfloat16))
    token_ids = torch.tensor([3, 39])
    expected = call(logits.contiguous(), token_ids, entropy_coef=0.1)
    assert all(map(torch.equal, call(logits, token_ids, out=logits, entropy_coef=0.1), expected))


def test_opcheck():
    batch = random_batch([2, 1], vocab_size=20)
    per_token = (batch.old_log_probs, None, None, torch.ones(3), torch.ones(3))
    arguments = ("minirl", True, 0.8, 1.27, 5.0, 0.0, "k3", 0.0, "triton")
    torch.library.opcheck(
        torch.ops.minirl_kernels.fused_policy_loss.default,
        (batch.logits, batch.token_ids, torch.ones(3), *per_token, *arguments),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [7, 1000, 9001])
def test_scale_in_place(vocab_size, dtype):
    buffer = random_logits(2, 3, vocab_size + 9, dtype=dtype)
    tensor, rest = buffer[:, :2, :vocab_size], buffer.clone()
    expected = (tensor.float() * -0.37).to(dtype)
    rest[:, :2, :vocab_size] = expected
    scale_in_place(tensor, torch.tensor(-0.37))
    assert torch.equal(buffer, rest)


def test_a_factor_of_1_touches_no_memory():
    tensor = random_logits(5, 100)
    with recording() as launches:
        scale_in_place(tensor, torch.tensor(1.0))
    assert traffic.traffic(*launches) == (5 * 4, 0)  # each program reads the factor
