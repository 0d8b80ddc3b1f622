"""fused_policy_loss against the equations in float64, from the logits to their gradient, on every backend."""

import math
from dataclasses import replace

import equations
import pytest
import torch
from dtypes import DTYPES
from policy_batches import LENGTHS, PRESETS, assert_as_exact_as_eager, batch_at_bounds, per_row, random_batch

from minirl_kernels import PolicyLossConfig, fused_policy_loss, policy_loss, token_logprobs

# every objective, every level of the correction, one and two phases, and the additional terms of a loss
CONFIGS = {
    "minirl": PolicyLossConfig(),
    "minirl-no-is": PolicyLossConfig(rollout_is=None),
    "minirl-sequence-is": PolicyLossConfig(rollout_is="sequence"),
    "minirl-no-bounds": PolicyLossConfig(clip=False, rollout_is_threshold=None),
    "minirl-kl-entropy": PolicyLossConfig(kl_coef=0.2, entropy_coef=0.1),
    "reinforce": PolicyLossConfig.reinforce(),
    "reinforce-truncated": PolicyLossConfig.reinforce(rollout_is_threshold=5.0, kl_coef=0.2, kl_estimator="k1"),
    "reinforce-no-is": PolicyLossConfig.reinforce(rollout_is=None),
    "sequence_is": PolicyLossConfig.sequence_is(),
    "sequence_is-truncated": PolicyLossConfig.sequence_is(rollout_is_threshold=5.0, entropy_coef=-0.1),
    "grpo": PolicyLossConfig.grpo(),
    "grpo-token-is": PolicyLossConfig.grpo(rollout_is="token", rollout_is_threshold=5.0),
    "grpo-sequence-is": PolicyLossConfig.grpo(rollout_is="sequence", rollout_is_threshold=5.0),
    "grpo-no-clip-kl": PolicyLossConfig.grpo(clip=False, kl_coef=0.2, kl_estimator="k2"),
    "cispo": PolicyLossConfig.cispo(),
    "cispo-token-is": PolicyLossConfig.cispo(rollout_is="token", rollout_is_threshold=5.0, entropy_coef=0.1),
    "cispo-no-clip": PolicyLossConfig.cispo(clip=False, rollout_is="sequence"),
    "gspo": PolicyLossConfig.gspo(),
    "gspo-token-is-kl": PolicyLossConfig.gspo(rollout_is="token", rollout_is_threshold=5.0, kl_coef=0.2),
    "seq-mean-token-mean": PolicyLossConfig(loss_agg_mode="seq-mean-token-mean"),
    "seq-mean-token-sum-norm": PolicyLossConfig(loss_agg_mode="seq-mean-token-sum-norm", loss_scale_factor=16.0),
    "token-mean": PolicyLossConfig(loss_agg_mode="token-mean"),
    "group-token-mean": PolicyLossConfig(loss_agg_mode="group-token-mean"),
}

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def call(batch, config, layout, backend, *, factor=1.0, **options):
    """(output, gradient of the logits [T, V] of the loss times factor)."""
    logits = batch.lay_out(batch.logits.clone(), layout).requires_grad_()
    token_ids = batch.lay_out(batch.token_ids, layout)
    out = fused_policy_loss(
        logits * 1 if options.get("overwrite_logits") else logits,
        token_ids,
        config=config,
        backend=backend,
        **batch.arguments(layout),
        **options,
    )
    (out.loss * factor).backward()
    return out, batch.pack(logits.grad, layout)


def eager_leaf(batch, dtype):
    """A leaf of the logits in float64, or in their own dtype for the eager path."""
    return batch.logits.to(torch.float64 if dtype == torch.float64 else batch.logits.dtype, copy=True).requires_grad_()


def by_equations(batch, config, dtype, temperature):
    """(loss; log_probs, entropy, token_grad, gradient of the logits; gradient of the entropy), computed in `dtype`."""
    leaf = eager_leaf(batch, dtype)
    log_probs, entropy = equations.token_log_probs(leaf.to(dtype), batch.token_ids, temperature)
    leaves = (log_probs, leaf, entropy)
    loss, *results, entropy_grad = equations.policy_loss_and_gradients(leaves, log_probs, entropy, batch, config)
    return loss, results, entropy_grad


def gradient_from(token_grad, entropy_grad, batch, dtype, temperature):
    """The gradient of the logits under gradients of the log-probabilities and the entropy, computed in `dtype`."""
    leaf = eager_leaf(batch, dtype)
    results = equations.token_log_probs(leaf.to(dtype), batch.token_ids, temperature)
    return torch.autograd.grad(results, leaf, (token_grad.to(dtype), entropy_grad.to(dtype)))[0]


def check_against_equations(batch, config, backend, temperature=1.0, **options):
    """Values and gradients are as exact as the eager path's, and the same bits in both layouts."""
    exact, eager = (by_equations(batch, config, dtype, temperature) for dtype in (torch.float64, torch.float32))
    results = []
    for layout in ("padded", "packed"):
        temperatures = batch.lay_out(temperature, layout) if isinstance(temperature, torch.Tensor) else temperature
        out, grad = call(batch, config, layout, backend, temperature=temperatures, **options)
        ours = [batch.pack(values, layout) for values in (out.log_probs, out.entropy, out.token_grad)] + [grad]
        for result, theirs, truth in zip(ours, eager[1], exact[1], strict=True):
            assert_as_exact_as_eager(result, theirs, truth)
        # the gradient row by row, under the returned token_grad: the error of token_grad is measured above
        theirs, truth = (
            gradient_from(ours[2], exact[2], batch, dtype, temperature) for dtype in (torch.float32, torch.float64)
        )
        assert_as_exact_as_eager(grad, theirs, truth, per_row(truth))
        # the losses of the tokens may cancel in their sum
        assert_as_exact_as_eager(out.loss, eager[0], exact[0], scale=out.token_loss.abs().sum())
        torch.testing.assert_close(out.token_loss.double().sum().float(), out.loss, rtol=1e-6, atol=1e-9)
        results.append((out.loss, batch.pack(out.token_loss, layout), *ours))
    assert all(map(torch.equal, *results))
    return out


@every_config
def test_on_either_side_of_every_bound(config, backend):
    batch = batch_at_bounds(config, vocab_size=19)
    out = check_against_equations(batch, config, backend)
    if config.clip and config.objective != "cispo":  # the batch must reach the mask
        metrics = out.metrics.compute()
        assert metrics["clip_fraction_high"] > 0.05
        assert metrics["clip_fraction_low"] > 0.05


@every_config
def test_random_batch_with_masks(config, backend):
    check_against_equations(random_batch(LENGTHS, vocab_size=131), config, backend)


@every_config
def test_on_policy_without_old_log_probs(config, backend):
    batch = replace(random_batch(LENGTHS, vocab_size=21), old_log_probs=None)
    check_against_equations(batch, config, backend)


@pytest.mark.parametrize("preset", ["minirl", "gspo"])
@pytest.mark.parametrize("temperature", [0.6, torch.linspace(0.5, 2, sum(LENGTHS))], ids=["number", "each"])
def test_temperature(temperature, preset, backend):
    config = PolicyLossConfig.preset(preset, entropy_coef=0.1)
    check_against_equations(random_batch(LENGTHS, vocab_size=21), config, backend, temperature)


@pytest.mark.parametrize("preset", ["minirl", "reinforce", "grpo", "cispo", "gspo"])
def test_advantages_per_token(preset, backend):
    batch = replace(random_batch(LENGTHS, vocab_size=21), advantages=torch.linspace(-1, 1, sum(LENGTHS)))
    check_against_equations(batch, PolicyLossConfig.preset(preset), backend)


@pytest.mark.parametrize("lengths", [[], [1], [0, 0], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_few_tokens(preset, lengths, backend):
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    check_against_equations(random_batch(lengths, vocab_size=21), config, backend)


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 1025, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_lengths_of_rows(preset, dtype, vocab_size, backend):
    batch = random_batch([3, 2], vocab_size=vocab_size, dtype=dtype)
    check_against_equations(batch, PolicyLossConfig.preset(preset, entropy_coef=0.1), backend)


@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_sum_to_the_batch(preset, backend):
    config = PolicyLossConfig.preset(preset, entropy_coef=0.1)
    batch = replace(random_batch(LENGTHS, vocab_size=21), group_ids=torch.tensor([7, 7, 3, 3, 9, 9]))
    whole, whole_grad = call(batch, config, "packed", backend)
    counts = {"num_responses": len(LENGTHS), "num_tokens": batch.loss_mask.sum().float(), "num_groups": 3}
    parts = [call(batch.responses(*part), config, "packed", backend, **counts) for part in ((0, 2), (2, 4), (4, 6))]
    torch.testing.assert_close(sum(out.loss for out, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_grad)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_ignored_ids_are_masked_tokens(preset, ids_dtype, backend):
    """-100 in token_ids has the effect of 0 in loss_mask."""
    batch, config = random_batch(LENGTHS, vocab_size=21), PolicyLossConfig.preset(preset, entropy_coef=0.1)
    expected, expected_grad = call(batch, config, "packed", backend)
    ids = batch.token_ids.masked_fill(~batch.loss_mask, -100).to(ids_dtype)
    ignored = replace(batch, token_ids=ids, loss_mask=torch.ones_like(batch.loss_mask))
    out, grad = call(ignored, config, "packed", backend)
    assert torch.equal(grad, expected_grad)
    for name in ("loss", "log_probs", "entropy", "token_loss", "token_grad"):
        assert torch.equal(getattr(out, name), getattr(expected, name))
    assert out.metrics.compute() == expected.metrics.compute()


@pytest.mark.parametrize("poison", [-200.0, -1e4, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preset", PRESETS)
def test_masked_tokens_may_hold_anything(preset, poison, backend):
    """Logits, ids, temperatures and log-probabilities of masked tokens are not used.

    A ratio of exp(200) there would be inf, and inf * 0 would be NaN.
    """
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    clean = random_batch(LENGTHS, vocab_size=21)
    masked = ~clean.loss_mask
    dirty = replace(
        clean,
        token_ids=clean.token_ids.masked_fill(masked, 10**6),
        logits=clean.logits.masked_fill(masked[:, None], poison),
        **{
            name: getattr(clean, name).masked_fill(masked, poison)
            for name in ("old_log_probs", "rollout_log_probs", "ref_log_probs")
        },
    )
    temperature = torch.ones(sum(LENGTHS)).masked_fill(masked, 0.0)
    expected, expected_grad = call(clean, config, "packed", backend, temperature=torch.ones(sum(LENGTHS)))
    out, grad = call(dirty, config, "packed", backend, temperature=temperature, check=True)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(grad, expected_grad)
    assert out.metrics.compute() == expected.metrics.compute()


@pytest.mark.parametrize("far", [-200.0, -1e4])
@pytest.mark.parametrize("preset", PRESETS)
def test_overflowing_ratio_of_a_token_without_advantage(preset, far, backend):
    batch = random_batch([2, 3], vocab_size=21)
    far = torch.full_like(batch.old_log_probs, far)
    batch = replace(batch, old_log_probs=far, rollout_log_probs=far, advantages=torch.zeros(2))
    out, grad = call(batch, PolicyLossConfig.preset(preset), "packed", backend)
    assert out.loss == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("first", [0, 2048], ids=["padded vocabulary", "empty first block"])
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_logits_of_minus_infinity(preset, first, backend):
    """Logits of -inf have no effect, in the entropy and its gradient too."""
    config = PolicyLossConfig.preset(preset, entropy_coef=0.1)
    batch = random_batch([3, 4], vocab_size=1000)
    logits = torch.full((7, 4097), -math.inf)
    logits[:, first : first + 1000] = batch.logits
    padded = replace(batch, logits=logits, token_ids=batch.token_ids + first)
    (out, grad), (expected, expected_grad) = (call(b, config, "packed", backend) for b in (padded, batch))
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.entropy, expected.entropy)
    torch.testing.assert_close(grad[:, first : first + 1000], expected_grad)
    assert grad.count_nonzero() == grad[:, first : first + 1000].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [CONFIGS["minirl-kl-entropy"], CONFIGS["gspo-token-is-kl"]], ids=["one", "two"])
def test_overwritten_logits_hold_the_same_gradient(config, dtype, backend):
    batch = random_batch(LENGTHS, vocab_size=131, dtype=dtype)
    expected, expected_grad = call(batch, config, "padded", backend)
    out, grad = call(batch, config, "padded", backend, overwrite_logits=True)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.token_loss, expected.token_loss)


@pytest.mark.parametrize("strides", [(90, 18), (18, 36), (90, 17), (17, 34)], ids=str)
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_overwriting_a_view_leaves_its_neighbours(preset, strides, cpu):
    """Only the rows are overwritten.

    Responses or positions are the outer dimension in memory, with and without gaps.
    """
    B, L, V = 2, 4, 17
    batch = random_batch([4, 4], vocab_size=V)
    arguments = {"token_ids": batch.token_ids.reshape(B, L), "advantages": torch.ones(B), "loss_mask": None}
    arguments["backend"] = cpu
    arguments |= {name: torch.full((B, L), -2.0) for name in ("old_log_probs", "rollout_log_probs")}
    arguments["config"] = PolicyLossConfig.preset(preset, clip=False)
    leaf = batch.logits.reshape(B, L, V).clone().requires_grad_()
    (expected,) = torch.autograd.grad(fused_policy_loss(**{**arguments, "logits": leaf}).loss, leaf)

    storage = torch.full((1000,), 7.25)
    view = storage.as_strided((B, L, V), (*strides, 1), 100)
    view.copy_(leaf.detach())
    logits = view.detach().requires_grad_()
    (grad,) = torch.autograd.grad(
        fused_policy_loss(**{**arguments, "logits": logits}, overwrite_logits=True).loss, logits
    )
    assert torch.equal(view, expected)
    assert grad.data_ptr() == view.data_ptr()
    view.fill_(7.25)
    assert torch.equal(storage, torch.full_like(storage, 7.25))


def test_autograd_notices_overwritten_logits(cpu):
    """An earlier operation that saved the logits must raise, and not silently use gradients in their place."""
    for preset in ("minirl", "gspo"):
        batch = random_batch(LENGTHS, vocab_size=21)
        logits = batch.logits.clone().requires_grad_() * 1
        z_loss = logits.square().sum()  # saves the logits
        out = fused_policy_loss(
            logits,
            batch.token_ids,
            overwrite_logits=True,
            backend=cpu,
            config=PolicyLossConfig.preset(preset),
            **batch.arguments("packed"),
        )
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (out.loss + z_loss).backward()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_second_backward(preset, factor, overwrite, cpu):
    """The forward makes the gradient and the first backward consumes it. A second backward raises."""
    batch = random_batch(LENGTHS, vocab_size=21)
    leaf = batch.logits.clone().requires_grad_()
    out = fused_policy_loss(
        leaf * 1,
        batch.token_ids,
        overwrite_logits=overwrite,
        backend=cpu,
        config=PolicyLossConfig.preset(preset),
        **batch.arguments("packed"),
    )
    scaled = factor * out.loss
    torch.autograd.grad(scaled, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"fused_policy_loss made its gradient in the forward, .* consumed"):
        torch.autograd.grad(scaled, leaf)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # subnormals of float16 would be rounded
def test_gradient_scales_with_grad_output(dtype, overwrite, backend):
    batch = random_batch(LENGTHS, vocab_size=21, dtype=dtype)
    _, once = call(batch, PolicyLossConfig(), "packed", backend)
    for factor in (-4.0, 0.5, 0.0):
        _, grad = call(batch, PolicyLossConfig(), "packed", backend, factor=factor, overwrite_logits=overwrite)
        assert torch.equal(grad, factor * once)  # powers of two are exact


def test_the_reference_may_be_run_backward_twice():
    """The reference backend gives away no buffer, and overwrites none."""
    batch = random_batch(LENGTHS, vocab_size=21)
    leaf = batch.logits.clone().requires_grad_()
    out = fused_policy_loss(
        leaf, batch.token_ids, overwrite_logits=True, backend="reference", **batch.arguments("packed")
    )
    first, second = (torch.autograd.grad(out.loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(leaf.detach(), batch.logits)


def test_gradient_accumulates_into_logits_used_twice(backend):
    """Nothing else writes to the returned buffer of the gradient."""
    batch = random_batch(LENGTHS, vocab_size=21)
    config = PolicyLossConfig()
    _, once = call(batch, config, "packed", backend)
    leaf = batch.logits.clone().requires_grad_()
    for _ in range(2):
        arguments = batch.arguments("packed")
        fused_policy_loss(leaf, batch.token_ids, backend=backend, config=config, **arguments).loss.backward()
    assert torch.equal(leaf.grad, once + once)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_gradient_the_values_are_the_same(preset, backend):
    """The forward without a gradient is another path through the kernels."""
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    batch = random_batch(LENGTHS, vocab_size=131)
    expected, _ = call(batch, config, "packed", backend)
    arguments = {"config": config, "backend": backend, **batch.arguments("packed")}
    alone = fused_policy_loss(batch.logits, batch.token_ids, **arguments)
    with torch.no_grad():
        also = fused_policy_loss(
            batch.logits.clone().requires_grad_(), batch.token_ids, overwrite_logits=True, **arguments
        )
    for out in (alone, also):
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, expected.loss.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(out.log_probs, expected.log_probs)
        assert torch.equal(out.entropy, expected.entropy)
        torch.testing.assert_close(out.token_grad, expected.token_grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_its_two_halves(preset, backend):
    """fused_policy_loss is token_logprobs followed by policy_loss."""
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    batch = random_batch(LENGTHS, vocab_size=131)
    out, grad = call(batch, config, "packed", backend)
    leaf = batch.logits.clone().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, batch.token_ids, with_entropy=True, backend=backend)
    halves = policy_loss(log_probs, entropy=entropy, config=config, **batch.arguments("packed"))
    halves.loss.backward()
    torch.testing.assert_close(out.loss, halves.loss)
    torch.testing.assert_close(grad, leaf.grad)
    ours, theirs = out.metrics.compute(), halves.metrics.compute()
    assert ours.keys() == theirs.keys()
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(dtype, backend):
    batch = random_batch(LENGTHS, vocab_size=33, dtype=dtype)
    for preset in PRESETS:
        config = PolicyLossConfig.preset(preset)
        expected, expected_grad = call(batch, config, "packed", backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, grad = call(batch, config, "packed", backend)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(grad, expected_grad)


def test_more_than_65535_tokens(backend):
    size = 70_001
    batch = random_batch([size - 4, 4], vocab_size=3)
    config = PolicyLossConfig(loss_agg_mode="token-mean")
    out, grad = call(batch, config, "packed", backend)
    count = batch.loss_mask.sum().float()
    tail, tail_grad = call(batch.responses(1, 2), config, "packed", backend, num_tokens=count)
    assert torch.equal(grad[-4:], tail_grad)
    assert torch.equal(out.token_loss[-4:], tail.token_loss)
    leaf = batch.logits.double().requires_grad_()
    log_p = torch.log_softmax(leaf, -1).gather(-1, batch.token_ids[:, None])[:, 0]
    (exact,) = torch.autograd.grad((log_p * out.token_grad).sum(), leaf)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-11)


@pytest.mark.parametrize(
    ("backend", "overwrite"), [("reference", False), ("cpu", False), ("cpu", True)], indirect=["backend"]
)
@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_addresses_beyond_2_to_the_31(preset, overwrite, tmp_path, backend):
    """Rows lie 2^30 elements apart in a sparse file of 6 GiB."""
    stride, vocab_size = 2**30, 1025
    batch = random_batch([2, 2], vocab_size=vocab_size, dtype=torch.bfloat16)
    config = PolicyLossConfig.preset(preset)
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=3 * stride + vocab_size, dtype=torch.bfloat16)
    far = file.as_strided((4, vocab_size), (stride, 1))
    far.copy_(batch.logits)
    expected, expected_grad = call(batch, config, "packed", backend)
    far.requires_grad_()
    out = fused_policy_loss(
        far,
        batch.token_ids,
        overwrite_logits=overwrite,
        config=config,
        backend=backend,
        **batch.arguments("packed"),
    )
    (grad,) = torch.autograd.grad(out.loss, far)
    assert torch.equal(grad, expected_grad)
    assert torch.equal(out.token_loss, expected.token_loss)
