"""Losses over the tokens that the sampler kept: from logits and from hidden states, in both layouts, on the CPU."""

from dataclasses import replace

import equations
import pytest
import torch
from dtypes import DTYPES
from kept_cases import (
    call_linear,
    check_head_outside_of_the_sets,
    check_linear,
    kept_log_probs,
    random_mask,
    random_sets,
)
from linear_head import assert_matrices_as_exact, random_head
from linear_logprobs_cases import OPTIONS
from policy_batches import LENGTHS, PRESETS, SLACK, assert_as_exact_as_eager, per_row, random_batch

from minirl_kernels import PolicyLossConfig, SamplingMask, fused_linear_policy_loss, fused_policy_loss
from minirl_kernels.ops.linear_token_logprobs import cpu as cpu_head


def batch_and_sets(vocab_size, dtype=torch.float32, logits=None, token_ids=None):
    """A batch and its sets; the old, rollout and reference log-probabilities are near the ones over the sets."""
    batch = random_batch(LENGTHS, vocab_size=vocab_size, dtype=dtype)
    if logits is not None:
        batch = replace(batch, logits=logits, token_ids=token_ids)
    sets = random_sets(batch.token_ids, vocab_size)
    spread = random_batch(LENGTHS)
    now = kept_log_probs(batch.logits.double(), batch.token_ids, sets)[0].float()
    names = ("old_log_probs", "rollout_log_probs", "ref_log_probs")
    return replace(batch, **{name: now + getattr(spread, name) - spread.log_probs for name in names}), sets


def laid_out(sets, batch, layout):
    flat = SamplingMask.from_sets(sets)
    if layout == "packed":
        return flat
    return SamplingMask.pad([flat[start:end] for start, end in batch.spans()], max(LENGTHS) + 1)


def by_equations(leaves, logits, batch, sets, config):
    log_probs, entropy = kept_log_probs(logits, batch.token_ids, sets)
    return equations.policy_loss_and_gradients(leaves, log_probs, entropy, batch, config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_policy_loss(preset, dtype, backend):
    """Both layouts, with and without overwriting. The gradient is exactly 0 outside of the sets."""
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    batch, sets = batch_and_sets(300, dtype)
    wide, narrow = batch.logits.double().requires_grad_(), batch.logits.clone().requires_grad_()
    exact = by_equations([wide], wide, batch, sets, config)
    eager = by_equations([narrow], narrow.float(), batch, sets, config)
    for layout, overwrite in (("packed", True), ("padded", False)):
        leaf = batch.lay_out(batch.logits, layout).clone().requires_grad_()
        logits = leaf * 1
        kept = laid_out(sets, batch, layout)
        ids = batch.lay_out(batch.token_ids, layout)
        out = fused_policy_loss(
            logits,
            ids,
            kept=kept,
            config=config,
            overwrite_logits=overwrite,
            backend=backend,
            **batch.arguments(layout),
        )
        stayed = torch.equal(logits.detach().nan_to_num(), leaf.detach().nan_to_num())
        assert stayed != (overwrite and backend == "cpu")
        (grad,) = torch.autograd.grad(-2.0 * out.loss, leaf)
        assert (
            abs(out.loss.double() - exact[0]) <= abs(eager[0].double() - exact[0]) + SLACK * out.token_loss.abs().sum()
        )
        ours = [batch.pack(values, layout) for values in (out.log_probs, out.entropy, grad / -2.0)]
        for result, theirs, truth in zip(ours, eager[1:], exact[1:], strict=True):
            assert_as_exact_as_eager(result, theirs, truth, per_row(truth) if truth.dim() == 2 else None)
        for row, one in zip(ours[2], sets, strict=True):
            outside = torch.ones(300, dtype=torch.bool)
            outside[slice(None) if one is None else one] = False
            assert not row[outside].any()


@pytest.mark.parametrize("overwrite", [False, True])
def test_without_a_gradient_the_logits_stay(overwrite, backend):
    batch, sets = batch_and_sets(60)
    kept, arguments = SamplingMask.from_sets(sets), batch.arguments("packed")
    arguments |= {"kept": kept, "overwrite_logits": overwrite, "backend": backend}
    logits = batch.logits.clone()
    out = fused_policy_loss(logits, batch.token_ids, **arguments)
    assert torch.equal(logits, batch.logits)
    expected = fused_policy_loss(batch.logits.clone().requires_grad_(), batch.token_ids, **arguments)
    for name in ("loss", "log_probs", "entropy", "token_grad"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_token_outside_of_its_set_leaves_the_logits_alone(overwrite, backend):
    batch, sets = batch_and_sets(60)
    place = int(batch.loss_mask.nonzero()[3])
    token = int(batch.token_ids[place])
    sets[place] = [(token + 1) % 60]
    logits = batch.logits.clone().requires_grad_()
    arguments = {**batch.arguments("packed"), "kept": SamplingMask.from_sets(sets)}
    with pytest.raises(ValueError, match=rf"^token_ids has the id {token} at row {place}, which is not among the 1 "):
        fused_policy_loss(logits, batch.token_ids, overwrite_logits=overwrite, backend=backend, **arguments)
    assert torch.equal(logits.detach(), batch.logits)
    arguments["loss_mask"][place] = False
    assert fused_policy_loss(logits, batch.token_ids, backend=backend, **arguments).loss.isfinite()


def test_overwritten_logits_hold_the_gradient_and_a_second_backward_raises(cpu):
    batch, sets = batch_and_sets(60)
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1
    squares = logits.square().sum()  # saves the logits
    kept = SamplingMask.from_sets(sets)
    out = fused_policy_loss(
        logits, batch.token_ids, kept=kept, overwrite_logits=True, backend=cpu, **batch.arguments("packed")
    )
    written = logits.detach().clone()
    (grad,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    assert torch.equal(grad, written)
    with pytest.raises(RuntimeError, match="an earlier backward has consumed that buffer"):
        out.loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_a_set_of_all_tokens_or_none_changes_no_bit(backend):
    batch, _ = batch_and_sets(300)

    def results(kept):
        leaf = batch.logits.clone().requires_grad_()
        arguments = {**batch.arguments("packed"), "kept": kept, "backend": backend}
        out = fused_policy_loss(leaf, batch.token_ids, config=PolicyLossConfig(entropy_coef=0.1), **arguments)
        return out.loss.detach(), out.log_probs.detach(), out.token_grad, *torch.autograd.grad(out.loss, leaf)

    expected = results(None)
    for sets in ([None] * 29, [list(range(300))] * 29):
        assert all(map(torch.equal, results(SamplingMask.from_sets(sets)), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_linear_token_logprobs(options, dtype, backend, monkeypatch):
    """Every option of the head, with ignored rows, in tiles of three rows."""
    monkeypatch.setattr(cpu_head, "rows_per_tile", lambda *_: 3)
    options = dict(options)
    head = random_head(7, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    head[2][[1, 5]] = -100
    check_linear(head, backend, **options)


def test_the_head_is_told_nothing_of_what_was_not_kept(backend):
    check_head_outside_of_the_sets(backend)


def test_bits_of_the_linear_form_are_those_of_its_logits(cpu, monkeypatch):
    """The bits do not depend on the size of tiles.

    Sets of the whole vocabulary give the bits of a call without sets.
    """
    head = random_head(20, 16, 500)
    hidden, weight, token_ids, _ = head
    kept = random_mask(token_ids, 500)
    expected = call_linear(head, kept, cpu)[:3]
    assert all(
        map(torch.equal, call_linear(head, SamplingMask.from_sets([None] * 20), cpu), call_linear(head, None, cpu))
    )
    for rows in (slice(0, 1), slice(3, 9), slice(0, 20)):
        ours = call_linear((hidden[rows], weight, token_ids[rows], None), kept[rows], cpu)[:2]
        assert all(torch.equal(a, b[rows]) for a, b in zip(ours, expected, strict=False))
    monkeypatch.setattr(cpu_head, "rows_per_tile", lambda *_: 7)
    assert all(map(torch.equal, call_linear(head, kept, cpu)[:3], expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_fused_linear_policy_loss(preset, dtype, backend, monkeypatch):
    """Tiles of four rows; rows without a gradient come last."""
    monkeypatch.setattr(cpu_head, "rows_per_tile", lambda *_: 4)
    config = PolicyLossConfig.preset(preset)
    hidden, weight, token_ids, _ = random_head(sum(LENGTHS), 24, 300, dtype)
    with torch.no_grad():
        batch, sets = batch_and_sets(300, logits=hidden.float() @ weight.float().T, token_ids=token_ids)
    batch.advantages[3] = 0.0
    results = []
    for wide in (True, False):
        leaves = [(x.double() if wide else x).clone().requires_grad_() for x in (hidden, weight)]
        logits = torch.nn.functional.linear(*leaves)
        results.append(by_equations(leaves, logits if wide else logits.float(), batch, sets, config))
    exact, eager = results
    # the padding of hidden states is NaN, which the eager path would multiply by 0
    for layout in ("packed",) if backend == "reference" else ("packed", "padded"):
        leaves = [x.clone().requires_grad_() for x in (batch.lay_out(hidden, layout), weight)]
        out = fused_linear_policy_loss(
            *leaves,
            batch.lay_out(token_ids, layout),
            kept=laid_out(sets, batch, layout),
            config=config,
            backend=backend,
            **batch.arguments(layout),
        )
        grads = torch.autograd.grad(out.loss, leaves)
        assert (
            abs(out.loss.double() - exact[0]) <= abs(eager[0].double() - exact[0]) + SLACK * out.token_loss.abs().sum()
        )
        ours = [*(batch.pack(values, layout) for values in (out.log_probs, out.entropy, grads[0])), grads[1]]
        for result, theirs, truth in zip(ours, eager[1:], exact[1:], strict=True):
            assert_matrices_as_exact(result, theirs, truth)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler, cpu):
    torch.compiler.reset()
    batch, sets = batch_and_sets(60)
    hidden, weight, *_ = random_head(sum(LENGTHS), 24, 60)
    kept, arguments = SamplingMask.from_sets(sets), batch.arguments("packed")

    def call(hidden, weight, kept):
        shared = {"kept": kept, "backend": cpu, **arguments}
        from_hidden = fused_linear_policy_loss(hidden, weight, batch.token_ids, **shared)
        from_logits = fused_policy_loss(hidden @ weight.T, batch.token_ids, overwrite_logits=True, **shared)
        return from_hidden.loss + from_logits.loss

    results = []
    for f in (torch.compile(call, fullgraph=True, backend=compiler), call):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss = f(*leaves, kept)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_under_autocast(cpu):
    """Autocast casts hidden states and weight, and nothing else."""
    head = random_head(10, 24, 60)
    hidden, weight, token_ids, _ = head
    kept = random_mask(token_ids, 60)
    expected = call_linear((hidden.bfloat16(), weight.bfloat16(), token_ids, None), kept, cpu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = call_linear(head, kept, cpu)
    assert all(torch.equal(a, b.float()) for a, b in zip(ours, expected, strict=True))
