"""policy_loss against the equations in float64: values, gradients, layouts, normalisers, traps, invalid arguments."""

from dataclasses import replace

import equations
import pytest
import torch
from policy_batches import LENGTHS, PRESETS, assert_as_exact_as_eager, batch_at_bounds, every_config, random_batch

from minirl_kernels import PolicyLossConfig, policy_loss

MODES = ("seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean", "group-token-mean")


def with_mode(config, mode):
    return replace(config, loss_agg_mode=mode, loss_scale_factor=16.0 if mode.endswith("norm") else None)


def name_of(config):
    clip = "clip" if config.clip else "noclip"
    return f"{config.objective}-{config.rollout_is}-{config.rollout_is_threshold}-{clip}"


def call(batch, config, layout, **options):
    """(output, gradient of the log-probabilities [T], gradient of the entropy [T])."""
    log_probs, entropy = (batch.lay_out(v.clone(), layout).requires_grad_() for v in (batch.log_probs, batch.entropy))
    out = policy_loss(log_probs, entropy=entropy, config=config, **batch.arguments(layout), **options)
    out.loss.backward()
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in (log_probs, entropy)]
    return out, *(batch.pack(grad, layout) for grad in grads)


def by_equations(batch, config, dtype, **counts):
    log_probs, entropy = (v.to(dtype, copy=True).requires_grad_() for v in (batch.log_probs, batch.entropy))
    leaves = (log_probs, entropy)
    loss, _, _, *grads = equations.policy_loss_and_gradients(leaves, *leaves, batch, config, **counts)
    return loss, *grads


def check_against_equations(batch, config, **counts):
    exact, eager = (by_equations(batch, config, dtype, **counts) for dtype in (torch.float64, torch.float32))
    results = {}
    for layout in ("padded", "packed"):
        out, *grads = results[layout] = call(batch, config, layout, **counts)
        for ours, theirs, truth in zip(grads, eager[1:], exact[1:], strict=True):
            assert_as_exact_as_eager(ours, theirs, truth)
        # the losses of the tokens may cancel in their sum
        assert_as_exact_as_eager(out.loss, eager[0], exact[0], scale=out.token_loss.abs().sum())
        assert torch.equal(batch.pack(out.token_grad, layout), grads[0])
        torch.testing.assert_close(out.token_loss.double().sum().float(), out.loss, rtol=1e-6, atol=1e-9)
        outside = ~batch.lay_out(batch.loss_mask, layout)
        for values in (out.token_loss, out.token_grad, out.log_probs, out.entropy):
            assert values.dtype == torch.float32
            assert not values.requires_grad
            assert torch.equal(values[outside], torch.zeros_like(values[outside]))
        assert torch.equal(batch.pack(out.log_probs, layout), batch.log_probs.where(batch.loss_mask, 0))
        assert torch.equal(batch.pack(out.entropy, layout), batch.entropy.where(batch.loss_mask, 0))
    (padded, *padded_grads), (packed, *packed_grads) = results.values()
    assert torch.equal(padded.loss, packed.loss)
    assert all(map(torch.equal, padded_grads, packed_grads))
    return packed


@pytest.mark.parametrize("config", list(every_config()), ids=name_of)
def test_objective_on_either_side_of_every_bound(config):
    check_against_equations(batch_at_bounds(config), config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_aggregation(preset, mode):
    config = with_mode(PolicyLossConfig.preset(preset), mode)
    check_against_equations(random_batch(LENGTHS), config)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("preset", PRESETS)
def test_kl_and_entropy_are_aggregated_like_the_objective(preset, estimator):
    config = PolicyLossConfig.preset(preset, kl_coef=0.3, kl_estimator=estimator, entropy_coef=0.07)
    check_against_equations(random_batch(LENGTHS), config)


@pytest.mark.parametrize("preset", PRESETS)
def test_on_policy_without_old_log_probs(preset):
    batch = replace(random_batch(LENGTHS), old_log_probs=None)
    check_against_equations(batch, PolicyLossConfig.preset(preset))


@pytest.mark.parametrize("preset", ["minirl", "reinforce", "grpo", "cispo", "gspo"])
def test_advantages_per_token(preset):
    batch = random_batch(LENGTHS)
    per_token = torch.linspace(-1, 1, sum(LENGTHS))
    check_against_equations(replace(batch, advantages=per_token), PolicyLossConfig.preset(preset))


def test_gspo_has_the_gradient_of_its_sequence_ratio():
    """The gradient is the derivative of min(s A, clip(s) A), where s = (prod r)^(1/|y|).

    The equations of the other tests use the token form.
    """
    config = PolicyLossConfig.gspo()
    batch = batch_at_bounds(config)
    log_probs = batch.log_probs.double().requires_grad_()
    loss = 0.0
    for (start, end), advantage in zip(batch.spans(), batch.advantages.double(), strict=True):
        s = (log_probs[start:end] - batch.old_log_probs[start:end].double()).mean().exp()
        clipped = s.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
        loss = loss - torch.minimum(s * advantage, clipped * advantage) / len(batch.lengths)
    (exact,) = torch.autograd.grad(loss, log_probs)
    _, grad, _ = call(batch, config, "packed")
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("lengths", [[], [1], [0, 0], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_few_tokens(preset, lengths):
    """No response, a single token, no tokens, and empty responses with a full one; empty responses count."""
    batch = random_batch(lengths)
    for mode in MODES:
        check_against_equations(batch, with_mode(PolicyLossConfig.preset(preset), mode))


@pytest.mark.parametrize("mode", MODES)
def test_masked_responses_count_and_bring_nothing(mode):
    config = with_mode(PolicyLossConfig(), mode)
    batch = random_batch(LENGTHS)
    none = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    out = check_against_equations(none, config)
    assert out.loss == 0
    assert out.metrics.compute() == {"num_tokens": 0, "num_responses": len(LENGTHS)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_sum_to_the_batch(preset, mode):
    config = with_mode(PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1), mode)
    batch = replace(random_batch(LENGTHS), group_ids=torch.tensor([7, 7, 3, 3, 9, 9]))
    whole, whole_grad, whole_entropy_grad = call(batch, config, "packed")
    counts = {
        "num_responses": len(LENGTHS),
        "num_tokens": torch.tensor(batch.loss_mask.sum().item()),
        "num_groups": 3.0,
    }
    parts = [call(batch.responses(*part), config, "packed", **counts) for part in ((0, 2), (2, 4), (4, 6))]
    torch.testing.assert_close(sum(out.loss for out, *_ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in parts]), whole_grad)
    torch.testing.assert_close(torch.cat([grad for *_, grad in parts]), whole_entropy_grad)


def test_liger_cispo_is_minirl_whose_mask_is_inactive():
    """With old = mu and an upper bound of 5, MiniRL is Liger's CISPO: sg[min(pi/mu, 5)] A log pi."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    gen = torch.Generator().manual_seed(0)
    B, L, H, V = 4, 6, 8, 13
    hidden, weight = torch.randn(B, L, H, generator=gen), torch.randn(V, H, generator=gen)
    ids = torch.randint(V, (B, L), generator=gen)
    mask = torch.rand(B, L, generator=gen) < 0.8
    advantages = torch.tensor([-1.0, 0.5, 2.0, -0.3])
    logits = (hidden @ weight.T).requires_grad_()
    log_probs = torch.log_softmax(logits, -1).gather(-1, ids[..., None]).squeeze(-1)
    log_w = torch.linspace(-2.5, 2.5, B * L).reshape(B, L)  # on both sides of log 5
    mu = log_probs.detach() - log_w

    config = PolicyLossConfig(clip=False)
    out = policy_loss(
        log_probs, old_log_probs=None, rollout_log_probs=mu, advantages=advantages, loss_mask=mask, config=config
    )
    (grad_logits,) = torch.autograd.grad(out.loss, logits)
    assert 0 < out.metrics.compute()["truncation_fraction"] < 1

    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss_fn = liger.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, compiled=False, loss_type="cispo", epsilon_high=5.0, temperature=1.0
    )
    theirs, _ = loss_fn(*leaves, ids, mask.float(), advantages, old_per_token_logps=mu, num_items_in_batch=1)
    theirs.backward()
    # Liger divides by num_items_in_batch, MiniRL by the number of responses
    torch.testing.assert_close(out.loss * B, theirs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.einsum("blv,vh->blh", grad_logits * B, weight), leaves[0].grad)
    torch.testing.assert_close(torch.einsum("blv,blh->vh", grad_logits * B, hidden), leaves[1].grad)


@pytest.mark.parametrize("poison", [-200.0, -1e4, float("-inf"), float("nan"), float("inf")])
@pytest.mark.parametrize("preset", PRESETS)
def test_masked_tokens_may_hold_anything(preset, poison):
    """A ratio of exp(200) in the padding would be inf, and inf * 0 is NaN."""
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    clean = random_batch(LENGTHS)
    masked = ~clean.loss_mask
    names = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "log_probs", "entropy")
    dirty = replace(clean, **{name: getattr(clean, name).masked_fill(masked, poison) for name in names})
    (out, *grads), (expected, *expected_grads) = (call(batch, config, "padded") for batch in (dirty, clean))
    assert torch.equal(out.loss, expected.loss)
    assert all(map(torch.equal, grads, expected_grads))
    assert out.metrics.compute() == expected.metrics.compute()


@pytest.mark.parametrize("far", [-200.0, -1e4])
@pytest.mark.parametrize("preset", PRESETS)
def test_overflowing_ratio_of_a_token_without_advantage(preset, far):
    """exp(200) overflows float32 and exp(1e4) float64. An advantage of 0 must still give no loss and no gradient."""
    out = policy_loss(
        torch.tensor([[-0.1, -0.2]]),
        old_log_probs=torch.full((1, 2), far),
        rollout_log_probs=torch.full((1, 2), far),
        advantages=torch.zeros(1),
        loss_mask=None,
        group_ids=torch.zeros(1, dtype=torch.int64),
        config=PolicyLossConfig.preset(preset),
    )
    assert out.loss == 0
    assert torch.equal(out.token_grad, torch.zeros(1, 2))


def test_a_ratio_at_its_bound_is_inside():
    """Eq. 7 masks r > 1 + high and r < 1 - low: a ratio of exactly 1 with bounds of 1 passes. So does w = C."""
    config = PolicyLossConfig(clip_ratio_low=0.0, clip_ratio_high=0.0, rollout_is_threshold=1.0)
    log_probs = torch.tensor([[-0.5], [-0.5]])
    arguments = dict.fromkeys(("old_log_probs", "rollout_log_probs"), log_probs)
    out = policy_loss(log_probs, advantages=torch.tensor([1.0, -1.0]), loss_mask=None, config=config, **arguments)
    assert out.token_grad.tolist() == [[-0.5], [0.5]]
    metrics = out.metrics.compute()
    assert metrics["clip_fraction_high"] == metrics["clip_fraction_low"] == metrics["truncation_fraction"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_log_probs_of_another_dtype(dtype):
    """The loss is computed in float32, and the gradient has the dtype of log_probs."""
    batch = random_batch(LENGTHS)
    rounded = batch.log_probs.to(dtype)
    out, grad, _ = call(replace(batch, log_probs=rounded), PolicyLossConfig(), "packed")
    expected, expected_grad, _ = call(replace(batch, log_probs=rounded.float()), PolicyLossConfig(), "packed")
    assert torch.equal(out.loss, expected.loss)
    assert grad.dtype == dtype
    assert torch.equal(grad, expected_grad.to(dtype))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_mask_of_any_dtype_and_none(mask_dtype):
    batch = random_batch(LENGTHS)
    expected = call(batch, PolicyLossConfig(), "packed")[0]
    assert torch.equal(
        call(replace(batch, loss_mask=batch.loss_mask.to(mask_dtype)), PolicyLossConfig(), "packed")[0].loss,
        expected.loss,
    )
    every = replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
    arguments = every.arguments("packed")
    with_ones = policy_loss(every.log_probs, **arguments)
    without = policy_loss(every.log_probs, **{**arguments, "loss_mask": None})
    assert torch.equal(with_ones.token_grad, without.token_grad)


@pytest.mark.parametrize("factor", [-3.0, 0.0, 1.0])
def test_gradient_scales_with_grad_output_and_may_be_taken_twice(factor):
    batch = random_batch(LENGTHS)
    log_probs = batch.log_probs.clone().requires_grad_()
    out = policy_loss(log_probs, **batch.arguments("packed"))
    scaled = factor * out.loss
    for _ in range(2):
        (grad,) = torch.autograd.grad(scaled, log_probs, retain_graph=True)
        assert torch.equal(grad, factor * out.token_grad)


def test_no_gradient_where_none_is_wanted():
    batch = random_batch(LENGTHS)
    assert not policy_loss(batch.log_probs, **batch.arguments("packed")).loss.requires_grad
    with torch.no_grad():
        assert not policy_loss(batch.log_probs.clone().requires_grad_(), **batch.arguments("packed")).loss.requires_grad


@pytest.mark.parametrize("preset", PRESETS)
def test_under_autocast(preset):
    """Autocast has no effect, not even on counts of tokens that bfloat16 cannot represent."""
    batch, config = random_batch([700, 501, 203, 1]), PolicyLossConfig.preset(preset)
    expected = call(batch, config, "padded")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(batch, config, "padded")
    assert torch.equal(out[0].loss, expected[0].loss)
    assert torch.equal(out[1], expected[1])


META = torch.device("meta")
LOG_PROBS = torch.full((2, 3), -1.0)
PACKED = torch.full((6,), -1.0)
GROUPED = PolicyLossConfig.cispo()


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"log_probs": [[-1.0]]}, TypeError, "log_probs", "list", "a float tensor"),
        ({"log_probs": LOG_PROBS.long()}, TypeError, "log_probs", "torch.int64", "a float tensor"),
        ({"log_probs": PACKED}, ValueError, "cu_seqlens", "None", r"int32 \[B \+ 1\]"),
        ({"log_probs": LOG_PROBS[None]}, ValueError, "cu_seqlens", "None", r"\[B \+ 1\]"),
        ({"old_log_probs": LOG_PROBS[:1]}, ValueError, "old_log_probs", r"\(1, 3\)", r"\(2, 3\)"),
        ({"old_log_probs": LOG_PROBS.long()}, TypeError, "old_log_probs", "torch.int64", "floating point"),
        ({"old_log_probs": LOG_PROBS.to(META)}, ValueError, "old_log_probs", "meta", "cpu"),
        ({"old_log_probs": -1.0}, TypeError, "old_log_probs", "float", "a tensor"),
        ({"rollout_log_probs": None}, ValueError, "rollout_log_probs", "None", "inference engine"),
        ({"rollout_log_probs": LOG_PROBS.T}, ValueError, "rollout_log_probs", r"\(3, 2\)", r"\(2, 3\)"),
        ({"rollout_log_probs": LOG_PROBS.to(META)}, ValueError, "rollout_log_probs", "meta", "cpu"),
        ({"advantages": torch.ones(3)}, ValueError, "advantages", r"\(3,\)", r"\[2\].* or \(2, 3\)"),
        ({"advantages": torch.ones(2, dtype=torch.int64)}, TypeError, "advantages", "torch.int64", "floating point"),
        ({"advantages": 1.0}, TypeError, "advantages", "float", "floating point tensor"),
        ({"advantages": torch.ones(2, device=META)}, ValueError, "advantages", "meta", "cpu"),
        ({"advantages": torch.ones(2, 3, device=META)}, ValueError, "advantages", "meta", "cpu"),
        ({"loss_mask": torch.ones(2, 2)}, ValueError, "loss_mask", r"\(2, 2\)", r"\(2, 3\)"),
        ({"loss_mask": [1, 1]}, TypeError, "loss_mask", "list", "a tensor, or None"),
        ({"loss_mask": torch.ones(2, 3, device=META)}, ValueError, "loss_mask", "meta", "cpu"),
        (
            {"ref_log_probs": None, "config": PolicyLossConfig(kl_coef=0.1)},
            ValueError,
            "ref_log_probs",
            "None",
            "reference",
        ),
        ({"ref_log_probs": LOG_PROBS[0]}, ValueError, "ref_log_probs", r"\(3,\)", r"\(2, 3\)"),
        ({"config": PolicyLossConfig(entropy_coef=0.1)}, ValueError, "entropy", "None", "pi_theta"),
        ({"entropy": LOG_PROBS[0]}, ValueError, "entropy", r"\(3,\)", r"\(2, 3\)"),
        ({"entropy": LOG_PROBS.to(META)}, ValueError, "entropy", "meta", "cpu"),
        ({"entropy": 0.5}, TypeError, "entropy", "float", "a tensor"),
        ({"group_ids": None, "config": GROUPED}, ValueError, "group_ids", "None", r"\[B\]"),
        ({"group_ids": torch.zeros(3).long(), "config": GROUPED}, ValueError, "group_ids", r"\(3,\)", r"\(2,\)"),
        ({"group_ids": torch.zeros(2).long().to(META), "config": GROUPED}, ValueError, "group_ids", "meta", "cpu"),
        ({"group_ids": [0, 0], "config": GROUPED}, TypeError, "group_ids", "list", "a tensor"),
        ({"group_ids": torch.zeros(2), "config": GROUPED}, TypeError, "group_ids", "torch.float32", "integers"),
        ({"num_responses": 0}, ValueError, "num_responses", "0", "above 0"),
        ({"num_responses": float("nan")}, ValueError, "num_responses", "nan", "above 0"),
        ({"num_responses": True}, TypeError, "num_responses", "True", "a number"),
        ({"num_responses": torch.ones(2)}, ValueError, "num_responses", r"\(2,\)", "a tensor of one"),
        ({"num_responses": torch.ones((), device=META)}, ValueError, "num_responses", "meta", "cpu"),
        (
            {"num_tokens": -1, "config": PolicyLossConfig(loss_agg_mode="token-mean")},
            ValueError,
            "num_tokens",
            "-1",
            "above 0",
        ),
        ({"num_groups": "2", "config": GROUPED}, TypeError, "num_groups", "'2'", "a number"),
        ({"config": "minirl"}, TypeError, "config", "str", "PolicyLossConfig"),
    ],
)
def test_bad_input(bad, error, named, was, must_be):
    """Each error names the argument, its value and the permitted values."""
    good = {
        "log_probs": LOG_PROBS,
        "old_log_probs": LOG_PROBS,
        "rollout_log_probs": LOG_PROBS,
        "advantages": torch.ones(2),
        "loss_mask": None,
        "group_ids": torch.zeros(2, dtype=torch.int64),
    }
    policy_loss(**good)
    with pytest.raises(error, match=rf"(?s)^{named}\b.*{was}.*must be.*{must_be}"):
        policy_loss(**{**good, **bad})


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "was", "must_be"),
    [
        (torch.tensor([0, 2, 5], dtype=torch.int32), ValueError, r"\[0, 2, 5\]", "end at the number of tokens, 6"),
        (torch.tensor([0, 2, 9], dtype=torch.int32), ValueError, r"\[0, 2, 9\]", "end at the number of tokens, 6"),
        (torch.tensor([1, 2, 6], dtype=torch.int32), ValueError, r"\[1, 2, 6\]", "start at 0"),
        (torch.tensor([0, 8, 6], dtype=torch.int32), ValueError, r"\[0, 8, 6\]", "never fall"),
        (torch.tensor([0.0, 6.0]), ValueError, "torch.float32", r"int32 \[B \+ 1\]"),
        (torch.tensor([[0, 6]], dtype=torch.int32), ValueError, r"\(1, 2\)", r"int32 \[B \+ 1\]"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"\(0,\)", r"int32 \[B \+ 1\]"),
        (torch.tensor([0], dtype=torch.int32), ValueError, r"\(1,\) with 6 tokens", "at least one"),
        (torch.tensor([0, 2, 6], dtype=torch.int32, device=META), ValueError, "meta", "cpu"),
        ([0, 2, 6], TypeError, "list", "a tensor"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, error, was, must_be):
    with pytest.raises(error, match=rf"(?s)^cu_seqlens\b.*{was}.*must be|must .*{must_be}") as caught:
        policy_loss(
            PACKED,
            old_log_probs=None,
            rollout_log_probs=PACKED,
            advantages=torch.ones(2),
            loss_mask=None,
            cu_seqlens=cu_seqlens,
        )
    for part in (was, must_be):
        assert caught.match(part)


def test_cu_seqlens_with_padded_log_probs():
    with pytest.raises(ValueError, match=r"cu_seqlens is given .*\(2, 3\): packed tokens must be \[T\]"):
        policy_loss(
            LOG_PROBS,
            old_log_probs=None,
            rollout_log_probs=LOG_PROBS,
            advantages=torch.ones(2),
            loss_mask=None,
            cu_seqlens=torch.tensor([0, 3, 6]),
        )
