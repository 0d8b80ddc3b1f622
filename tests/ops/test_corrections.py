"""The correction by d as a value: its weights against a plain loop, in every loss, in the metrics."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton_cases
from policy_batches import TOKEN_LEVEL, random_batch

from minirl_kernels import (
    Correction,
    PolicyLossConfig,
    PolicyLossInputs,
    fused_linear_policy_loss,
    fused_policy_loss,
    policy_loss,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "corrections.md"
LENGTHS = [5, 1, 3, 8, 4]
CORRECTIONS = [
    Correction(upper=1.5),
    Correction(lower=0.8, upper=1.3),
    Correction(lower=0.7, upper=1.4, beyond="mask_token"),
    Correction(upper=1.4, beyond="mask_token", weighs=False),
    Correction(lower=0.5, beyond="mask_response", weighs=False),
    Correction(level="sequence", upper=1.2),
    Correction(level="sequence", lower=0.7, upper=1.6, beyond="mask_response"),
    Correction(level="sequence_mean", lower=0.95, upper=1.05),
    Correction(level="sequence_mean", lower=0.9, upper=1.1, beyond="mask_response", weighs=False),
    Correction(upper=1.2, normalise=True),
    Correction(lower=0.7, upper=1.4, beyond="mask_token", normalise=True),
    Correction(level="sequence", upper=1.3, normalise=True),
]
WIDE = Correction(level="sequence", lower=0.6, upper=1.7, beyond="mask_response")


def weights_by_loop(correction, batch):
    """([T] the weight of each token, [T] whether a bound changes it), in Python floats."""
    weights, changed = [0.0] * sum(batch.lengths), [False] * sum(batch.lengths)
    units = []  # tokens that share one weight
    for start, end in batch.spans():
        tokens = [t for t in range(start, end) if batch.loss_mask[t]]
        log_d = {t: batch.old_log_probs[t].item() - batch.rollout_log_probs[t].item() for t in tokens}
        if correction.level == "token":
            values = {t: math.exp(log_d[t]) for t in tokens}
        else:
            product = math.exp(sum(log_d.values()))
            mean = product ** (1 / max(len(tokens), 1))
            values = dict.fromkeys(tokens, product if correction.level == "sequence" else mean)
        low, high = correction.lower or 0.0, correction.upper or math.inf
        beyond = {t: not low <= value <= high for t, value in values.items()}
        if correction.beyond == "mask_response" and any(beyond.values()):
            beyond = dict.fromkeys(tokens, True)
        for t in tokens:
            changed[t] = beyond[t]
            if correction.beyond == "truncate":
                weights[t] = min(max(values[t], low), high)
            elif not beyond[t]:
                weights[t] = values[t] if correction.weighs else 1.0
        units += [[t] for t in tokens] if correction.level == "token" else [tokens] if tokens else []
    if correction.normalise:
        kept = [weights[unit[0]] for unit in units if weights[unit[0]]]
        weights = [weight / (sum(kept) / len(kept)) for weight in weights]
    return torch.tensor(weights, dtype=torch.float64), torch.tensor(changed)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("preset", ["grpo", "cispo", "gspo", "reinforce"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=repr)
def test_every_token_has_the_weight_of_its_d(correction, preset, layout):
    batch = random_batch(LENGTHS, spread=0.3)
    weights, changed = weights_by_loop(correction, batch)
    assert changed.any()
    assert not changed[batch.loss_mask].all()
    arguments = batch.arguments(layout)
    log_probs = batch.lay_out(batch.log_probs, layout)
    plain, corrected = (
        policy_loss(
            log_probs,
            config=PolicyLossConfig.preset(preset, rollout_is=rollout_is, rollout_is_threshold=None),
            **arguments,
        )
        for rollout_is in (None, correction)
    )
    for name in ("token_grad", "token_loss"):
        theirs, ours = (batch.pack(getattr(out, name), layout).double() for out in (plain, corrected))
        torch.testing.assert_close(ours, weights * theirs, rtol=1e-6, atol=1e-12)
    computed = corrected.metrics.compute()
    assert computed["truncation_fraction"] == changed.double().sum() / batch.loss_mask.sum()
    assert computed["clip_fraction_high"] == plain.metrics.compute()["clip_fraction_high"]


@pytest.mark.parametrize("correction", [CORRECTIONS[1], CORRECTIONS[2], CORRECTIONS[6]], ids=repr)
def test_minirl_truncates_the_product_of_its_weight(correction):
    """d in w = d r is replaced by the correction; the bound of w stays."""
    batch = random_batch(LENGTHS, spread=0.3)
    weights, changed = weights_by_loop(correction, batch)
    config = PolicyLossConfig(rollout_is=correction, rollout_is_threshold=1.1, clip=False)
    out = policy_loss(batch.log_probs, config=config, **batch.arguments("packed"))
    r = (batch.log_probs.double() - batch.old_log_probs.double()).exp()
    expected = -(weights * r).clamp(max=1.1) * batch.token_advantages().double() * batch.loss_mask / len(LENGTHS)
    torch.testing.assert_close(out.token_grad.double(), expected, rtol=1e-6, atol=1e-12)
    beyond = (changed | (weights * r > 1.1)) & batch.loss_mask
    assert out.metrics.compute()["truncation_fraction"] == beyond.double().sum() / batch.loss_mask.sum()


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("preset", ["minirl", "grpo", "cispo", "gspo"])
@pytest.mark.parametrize("correction", [CORRECTIONS[2], WIDE, CORRECTIONS[9]], ids=repr)
def test_the_fused_losses_correct_alike(correction, preset, on_policy, cpu):
    """One sweep if d is known before it, else two phases: the weights are the same."""
    batch = random_batch(LENGTHS, vocab_size=40, spread=0.2)
    if on_policy:
        batch = replace(batch, old_log_probs=None)
    check_fused(batch, PolicyLossConfig.preset(preset, rollout_is=correction, clip=False), cpu)


def check_fused(batch, config, backend):
    arguments = batch.arguments("packed")
    results = []
    for call, name in (
        (fused_policy_loss, "reference"),
        (fused_policy_loss, backend),
        (fused_linear_policy_loss, backend),
    ):
        leaf = batch.logits.clone().requires_grad_()
        operands = (leaf,) if call is fused_policy_loss else (leaf, torch.eye(batch.logits.shape[-1]))
        out = call(*operands, batch.token_ids, config=config, backend=name, **arguments)
        results.append((out.loss.detach(), out.token_grad, *torch.autograd.grad(out.loss, leaf)))
        fractions = {name: value for name, value in out.metrics.compute().items() if name.endswith("_fraction")}
        results[-1] += (torch.tensor(list(fractions.values())),)
    for fused in results[1:]:
        for ours, theirs in zip(fused, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert results[0][1].any()


@triton_cases.interpreter_only()
@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_a_masked_token_is_zero_in_triton(preset):
    """A masked token has d = exp(-inf) in the kernel's single sweep."""
    batch = random_batch(LENGTHS, vocab_size=33)
    check_fused(batch, PolicyLossConfig.preset(preset, rollout_is=CORRECTIONS[2]), "triton")


def test_every_line_of_the_page_is_a_correction():
    lines = re.findall(r"\| `(Correction\(.*\))` \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        PolicyLossConfig.grpo(rollout_is=eval(line))


def test_a_level_by_name_is_the_correction_with_its_threshold():
    batch = random_batch(LENGTHS, spread=0.8)
    for level in ("token", "sequence"):
        by_name = PolicyLossConfig.grpo(rollout_is=level, rollout_is_threshold=1.5)
        by_value = PolicyLossConfig.grpo(rollout_is=Correction(level=level, upper=1.5))
        old, new = (policy_loss(batch.log_probs, config=c, **batch.arguments("packed")) for c in (by_name, by_value))
        torch.testing.assert_close(new.token_grad, old.token_grad, rtol=1e-6, atol=1e-9)
        assert torch.equal(new.metrics.sums, old.metrics.sums)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_masked_token_may_have_any_d(overwrite, cpu):
    """An overflow of a masked token's d does not raise, and its KL term stays."""
    batch = random_batch([3, 4], vocab_size=40)
    batch.loss_mask[:] = True
    batch.rollout_log_probs[4] -= 1e4
    config = PolicyLossConfig.grpo(rollout_is=Correction(upper=5.0, beyond="mask_token"), kl_coef=0.1)
    leaf = batch.logits.clone().requires_grad_()
    out = fused_policy_loss(
        leaf, batch.token_ids, config=config, backend=cpu, overwrite_logits=overwrite, **batch.arguments("packed")
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    assert grad.isfinite().all()
    kl_alone = torch.autograd.grad(
        policy_loss(
            (log_probs := out.log_probs.clone().requires_grad_()),
            config=config,
            **{**batch.arguments("packed"), "advantages": torch.zeros(2)},
        ).loss,
        log_probs,
    )[0]
    assert out.token_grad[4] == kl_alone[4] != 0


@pytest.mark.parametrize("name", ["num_responses", "num_tokens", "num_groups"])
def test_a_mean_over_a_part_of_the_mini_batch_is_refused(name):
    batch = random_batch(LENGTHS)
    config = PolicyLossConfig.grpo(rollout_is=Correction(normalise=True))
    with pytest.raises(ValueError, match=rf"^{name} is given .*normalise=True.*must be None"):
        policy_loss(batch.log_probs, config=config, **batch.arguments("packed"), **{name: 7})


def test_a_normalised_correction_is_not_split():
    """Each micro-batch would divide by a mean of its own."""
    batch = random_batch(LENGTHS, vocab_size=33)
    config = PolicyLossConfig.grpo(rollout_is=Correction(normalise=True))
    inputs = PolicyLossInputs.prepare(batch.token_ids, config=config, **batch.arguments("packed"))
    with pytest.raises(ValueError, match=r"^config has rollout_is=.*: normalise must be False"):
        inputs.split(2)


def test_all_masked_and_normalised_is_zero():
    batch = random_batch(LENGTHS)
    correction = Correction(lower=1e6, beyond="mask_token", normalise=True)
    out = policy_loss(batch.log_probs, config=PolicyLossConfig.grpo(rollout_is=correction), **batch.arguments("packed"))
    assert out.loss == 0
    assert not out.token_grad.any()
    assert out.metrics.compute()["truncation_fraction"] == 1


@pytest.mark.parametrize("correction", [CORRECTIONS[4], CORRECTIONS[11]], ids=repr)
def test_compiled_without_a_graph_break(correction, cpu):
    batch = random_batch(LENGTHS, vocab_size=40)
    config = PolicyLossConfig.grpo(rollout_is=correction)
    arguments = batch.arguments("packed")

    def loss(logits):
        return fused_policy_loss(logits, batch.token_ids, config=config, backend=cpu, **arguments).loss

    grads = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = batch.logits.clone().requires_grad_()
        grads += torch.autograd.grad(call(leaf), leaf)
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("fields", "error", "named", "was", "must_be"),
    [
        ({"level": "response"}, ValueError, "level", "'response'", "'token', 'sequence', 'sequence_mean'"),
        ({"beyond": "clip"}, ValueError, "beyond", "'clip'", "'truncate', 'mask_token', 'mask_response'"),
        ({"upper": 0.0}, ValueError, "upper", "0.0", "above 0 and finite, or None"),
        ({"lower": math.inf}, ValueError, "lower", "inf", "above 0 and finite, or None"),
        ({"upper": "2"}, TypeError, "upper", "'2'", "a number"),
        ({"lower": 2.0, "upper": 1.0}, ValueError, "lower", "2.0", "at most upper"),
        ({"beyond": "mask_token"}, ValueError, "beyond", "'mask_token'", "'truncate', or have a bound"),
        (
            {"level": "sequence", "upper": 2.0, "beyond": "mask_token"},
            ValueError,
            "beyond",
            "'mask_token'",
            "'mask_response'",
        ),
        ({"upper": 2.0, "weighs": False}, ValueError, "weighs", "False", "True"),
        ({"weighs": 0}, TypeError, "weighs", "0", "a bool"),
        (
            {"upper": 2.0, "beyond": "mask_token", "weighs": False, "normalise": True},
            ValueError,
            "normalise",
            "True",
            "False",
        ),
    ],
)
def test_a_correction_that_means_nothing_is_refused(fields, error, named, was, must_be):
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must be.*{must_be}"):
        Correction(**fields)


@pytest.mark.parametrize(
    ("preset", "fields", "named", "must_be"),
    [
        ("grpo", {"rollout_is": Correction(upper=2.0), "rollout_is_threshold": 2.0}, "rollout_is_threshold", "None"),
        ("sequence_is", {"rollout_is": Correction(upper=2.0)}, "rollout_is", "'sequence' or None"),
    ],
)
def test_a_correction_that_does_not_fit_the_objective_is_refused(preset, fields, named, must_be):
    with pytest.raises(ValueError, match=rf"^{named} is .*must be {must_be}"):
        PolicyLossConfig.preset(preset, **fields)
