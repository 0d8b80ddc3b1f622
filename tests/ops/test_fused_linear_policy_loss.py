"""fused_linear_policy_loss against float64 and against fused_policy_loss of the same logits; skipped rows; bits."""

from dataclasses import replace

import pytest
import sharded_head
import torch
from dtypes import DTYPES
from linear_head import TINY_TEMPERATURE, cancelling_head, count_matmuls, random_head
from linear_loss_cases import OPTIONS, TOKENS, batch_of, by_equations, call, check_against_equations, head_and_batch
from policy_batches import LENGTHS, PRESETS, random_batch

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss, fused_policy_loss
from minirl_kernels.ops.linear_token_logprobs import cpu
from minirl_kernels.ops.linear_token_logprobs.head import prepare_head
from minirl_kernels.ops.linear_token_logprobs.tiles import logit_tiles


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype):
    options = dict(options)
    head = random_head(TOKENS, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    check_against_equations(head, batch_of(head, LENGTHS, **options), PolicyLossConfig(), "cpu", **options)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("extra", [{}, {"kl_coef": 0.3, "entropy_coef": 0.07}, {"rollout_is": "sequence"}], ids=str)
def test_objectives(preset, extra):
    head, batch = head_and_batch(20, 130)
    check_against_equations(head, batch, PolicyLossConfig.preset(preset, **extra), "cpu")


@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_on_policy_without_old_log_probs(preset, backend):
    head, batch = head_and_batch(20, 130)
    batch = replace(batch, old_log_probs=None)
    hidden, weight, token_ids, _ = head
    leaf = hidden.clone().requires_grad_()
    out = fused_linear_policy_loss(
        leaf, weight, token_ids, config=PolicyLossConfig.preset(preset), backend=backend, **batch.arguments("packed")
    )
    expected = by_equations(head, batch, PolicyLossConfig.preset(preset), torch.float64)
    torch.testing.assert_close(out.loss.detach().double(), expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(out.loss, leaf)[0].double(), expected[3], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_equal_to_fused_policy_loss_of_the_same_logits(preset, entropy_coef):
    head, batch = head_and_batch(20, 130)
    hidden, weight, token_ids, _ = head
    config = PolicyLossConfig.preset(preset, entropy_coef=entropy_coef)
    rows = prepare_head(hidden, weight, token_ids, None, 1.0, None, 1.0, None, None).rows(token_ids)
    x = torch.cat([tile.logits.clone() for _, tile in logit_tiles(cpu, rows)]).requires_grad_()
    expected = fused_policy_loss(x, token_ids, config=config, **batch.arguments("packed"))
    (grad,) = torch.autograd.grad(expected.loss, x)
    out, (grad_hidden, grad_weight) = call(head, batch, "cpu", config=config)
    for ours, theirs in zip(out[2:], expected[2:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(out.loss, expected.loss)
    assert out.metrics.compute() == expected.metrics.compute()
    torch.testing.assert_close(grad_hidden, grad @ weight)
    torch.testing.assert_close(grad_weight, grad.T @ hidden)


def test_metrics_and_reference_agree():
    head, batch = head_and_batch(20, 130)
    ours, theirs = (call(head, batch, backend)[0].metrics.compute() for backend in ("cpu", "reference"))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens, backend):
    head, batch = head_and_batch(4, 7, lengths=[tokens])
    batch = replace(batch, loss_mask=torch.ones(tokens, dtype=torch.bool))
    out, grads = call(head, batch, backend, config=PolicyLossConfig(clip=False))
    assert [tuple(grad.shape) for grad in grads] == [(tokens, 4), (7, 4)]
    assert bool(grads[1].any()) == bool(tokens)
    assert bool(out.loss) == bool(tokens)


@pytest.mark.parametrize("tiles", [1, 8, 64])
def test_gradient_of_the_weight_does_not_lose_accuracy_with_tiles(tiles, monkeypatch):
    """The sum over tiles is not rounded to bfloat16.

    With 64 tiles, a rounding after every tile would give many times the error.
    """
    head, batch = head_and_batch(16, 200, torch.bfloat16, lengths=[128] * 8)
    exact = by_equations(head, batch, PolicyLossConfig(clip=False), torch.float64)[-1]
    monkeypatch.setattr(cpu, "rows_per_tile", lambda rows, _: -(-rows // tiles))
    _, (_, grad_weight) = call(head, batch, "cpu", config=PolicyLossConfig(clip=False))
    error = ((grad_weight.double() - exact).norm() / exact.norm()).item()
    rounding = ((exact.bfloat16().double() - exact).norm() / exact.norm()).item()
    assert error < 1.5 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zero_advantage_are_left_out_exactly(dtype, monkeypatch):
    lengths = [6, 5, 8]
    head, batch = head_and_batch(12, 40, dtype, lengths=lengths)
    batch = replace(
        batch, advantages=torch.tensor([1.0, 0.0, -0.5]), loss_mask=torch.ones(19, dtype=torch.bool),
        old_log_probs=batch.log_probs, rollout_log_probs=batch.log_probs,
    )  # fmt: skip
    config = PolicyLossConfig(clip=False)
    shapes = count_matmuls(monkeypatch, cpu)
    out, (grad_hidden, grad_weight) = call(head, batch, "cpu", config=config)
    assert shapes == [(19, 12), (14, 40), (40, 14)]
    assert bool((out.entropy > 0).all())
    # the gradients do not depend on the hidden states of rows of zero advantage
    kept = torch.ones(19, dtype=torch.bool)
    kept[6:11] = False
    hidden, weight, token_ids, _ = head
    part = replace(
        batch.responses(0, 1), lengths=[6, 8], advantages=torch.tensor([1.0, -0.5]),
        **{name: getattr(batch, name)[kept] for name in
           ("old_log_probs", "rollout_log_probs", "ref_log_probs", "loss_mask", "log_probs")},
        group_ids=torch.tensor([0, 1]),
    )  # fmt: skip
    _, alone = call((hidden[kept], weight, token_ids[kept], None), part, "cpu", config=config, num_responses=3)
    assert torch.equal(grad_hidden[kept], alone[0])
    assert torch.equal(grad_hidden[~kept], torch.zeros_like(grad_hidden[~kept]))
    assert torch.equal(grad_weight, alone[1])


def test_masked_rows_are_not_computed(monkeypatch):
    head, batch = head_and_batch(12, 40)
    shapes = count_matmuls(monkeypatch, cpu)
    hidden, weight, token_ids, _ = head
    hidden[~batch.loss_mask] = float("nan")
    config = PolicyLossConfig(clip=False)
    out, grads = call((hidden, weight, token_ids, None), batch, "cpu", config=config)
    assert shapes[0] == (int(batch.loss_mask.sum()), 12)
    assert all(bool(values.isfinite().all()) for values in (out.loss, out.log_probs, out.entropy, *grads))


@pytest.mark.parametrize("config", [PolicyLossConfig(), PolicyLossConfig.gspo()], ids=["one sweep", "two phases"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_parts_cost_no_matmul(frozen, config, monkeypatch):
    head, batch = head_and_batch(12, 40)
    _, (grad_hidden, grad_weight) = call(head, batch, "cpu", config=config)
    shapes = count_matmuls(monkeypatch, cpu)
    hidden, weight, token_ids, _ = head
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    out = fused_linear_policy_loss(hidden, weight, token_ids, config=config, **batch.arguments("packed"))
    if frozen == "both":
        assert not out.loss.requires_grad
        assert len(shapes) == 1
        return
    leaf, expected = (weight, grad_weight) if frozen == "hidden" else (hidden, grad_hidden)
    assert torch.equal(torch.autograd.grad(out.loss, leaf)[0], expected)
    assert len(shapes) == (3 if config.is_sequence_level else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [PolicyLossConfig(clip=False), PolicyLossConfig(clip=False, entropy_coef=0.1)])
def test_bits_depend_on_the_token_alone(config, dtype, threads, monkeypatch):
    lengths = [20, 13, 17]
    hidden, weight, token_ids = cancelling_head(50, 300, 700, dtype)
    batch = replace(random_batch(lengths), loss_mask=torch.ones(50, dtype=torch.bool))
    batch = replace(batch, old_log_probs=torch.full((50,), -6.5), rollout_log_probs=torch.full((50,), -6.4))
    options = {"config": config, "temperature": TINY_TEMPERATURE, "num_responses": 64}

    def run(part, rows):
        out, grads = call((hidden[rows], weight, token_ids[rows], None), part, "cpu", **options)
        return out.log_probs, out.entropy, out.token_loss, out.token_grad, grads[0]

    threads(1)
    whole = run(batch, slice(None))
    assert all(values.unique().numel() > 20 for values in whole)
    assert all(map(torch.equal, run(batch.responses(1, 2), slice(20, 33)), (values[20:33] for values in whole)))
    assert all(map(torch.equal, run(batch.responses(2, 3), slice(33, 50)), (values[33:] for values in whole)))
    threads(2)
    assert all(map(torch.equal, run(batch, slice(None)), whole))
    monkeypatch.setattr(cpu, "rows_per_tile", lambda *_: 7)
    assert all(map(torch.equal, run(batch, slice(None)), whole))


def test_any_grad_output_and_one_backward(backend):
    head, batch = head_and_batch(12, 40)
    _, once = call(head, batch, backend)
    _, thrice = call(head, batch, backend, grad_output=3.0)
    for grad, other in zip(once, thrice, strict=True):
        torch.testing.assert_close(other, 3 * grad)
    hidden, weight, token_ids, _ = head
    out = fused_linear_policy_loss(
        hidden.requires_grad_(), weight, token_ids, backend=backend, **batch.arguments("packed")
    )
    out.loss.backward(retain_graph=True)
    if backend != "reference":
        with pytest.raises(RuntimeError, match=r"^fused_linear_policy_loss made its gradient in the forward"):
            out.loss.backward()


def test_tied_embeddings(backend):
    """The head is the embedding: the gradients of both uses add up."""
    (_, table, token_ids, _), batch = head_and_batch(12, 40)
    table.requires_grad_()
    hidden = table[token_ids.roll(1)]
    config = PolicyLossConfig(clip=False)
    out = fused_linear_policy_loss(
        hidden, table, token_ids, config=config, backend=backend, **batch.arguments("packed")
    )
    expected = fused_policy_loss(
        table[token_ids.roll(1)] @ table.T, token_ids, config=config, **batch.arguments("packed")
    )
    ours, theirs = (torch.autograd.grad(result.loss, table)[0] for result in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_under_autocast(backend):
    (hidden, weight, token_ids, _), batch = head_and_batch(12, 40)
    _, expected = call((hidden.bfloat16(), weight.bfloat16(), token_ids, None), batch, backend)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_linear_policy_loss(*leaves, token_ids, backend=backend, **batch.arguments("packed"))
    grads = torch.autograd.grad(out.loss, leaves)
    assert all(torch.equal(ours, theirs.float()) for ours, theirs in zip(grads, expected, strict=True))


def test_registered_op():
    (hidden, weight, token_ids, bias), batch = head_and_batch(12, 40, with_bias=True)
    tokens = torch.ones(TOKENS)
    torch.library.opcheck(
        torch.ops.minirl_kernels.fused_linear_policy_loss.default,
        (hidden, weight, bias, token_ids, tokens, 0.0, None, None, batch.old_log_probs, None, None, tokens, tokens,
         "grpo", True, 0.8, 1.2, 5.0, 0.0, "k3", 0.0, True, False, True, None, "cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("config", [PolicyLossConfig(), PolicyLossConfig.gspo()], ids=["one sweep", "two phases"])
def test_compiles_whole(config):
    (hidden, weight, token_ids, _), batch = head_and_batch(12, 40)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    arguments = batch.arguments("packed")

    def loss(hidden, weight):
        return 2 * fused_linear_policy_loss(hidden, weight, token_ids, config=config, **arguments).loss

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vocabulary_over_two_processes():
    sharded_head.run("fused_linear_policy_loss")


HIDDEN, WEIGHT, IDS = torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64)
PER_TOKEN = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"hidden": HIDDEN.double()}, TypeError, "hidden", "torch.float64", "float32, bfloat16 or float16"),
        ({"weight": WEIGHT[:, :4]}, ValueError, "weight", r"\(7, 4\)", r"\[V, 5\]"),
        ({"bias": torch.zeros(5)}, ValueError, "bias", r"\(5,\)", r"\[7\]"),
        ({"token_ids": IDS[0]}, ValueError, "token_ids", r"\(3,\)", r"\(2, 3\)"),
        ({"token_ids": IDS + 7}, ValueError, "token_ids", "7 at row 0", r"\[0, 7\)"),
        ({"old_log_probs": PER_TOKEN[0]}, ValueError, "old_log_probs", r"\(3,\)", r"\(2, 3\)"),
        ({"rollout_log_probs": None}, ValueError, "rollout_log_probs", "None", "log-probabilities"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages", r"\(3,\)", r"\[2\]"),
        ({"loss_mask": PER_TOKEN[0]}, ValueError, "loss_mask", r"\(3,\)", r"\(2, 3\)"),
        ({"config": "minirl"}, TypeError, "config", "str", "PolicyLossConfig"),
        ({"logit_scale": 0}, ValueError, "logit_scale", "0", "above 0"),
        ({"logit_softcap": -3}, ValueError, "logit_softcap", "-3", "above 0"),
        ({"temperature": -1.0}, ValueError, "temperature", "-1.0", "above 0"),
        ({"num_responses": 0}, ValueError, "num_responses", "0", "above 0"),
        ({"backend": "cuda"}, ValueError, "backend", "'cuda'", "auto, reference, cpu, triton"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    arguments = {
        "hidden": HIDDEN, "weight": WEIGHT, "token_ids": IDS, "old_log_probs": PER_TOKEN,
        "rollout_log_probs": PER_TOKEN, "advantages": torch.zeros(2), "loss_mask": None, "backend": backend,
    }  # fmt: skip
    fused_linear_policy_loss(**arguments)
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        fused_linear_policy_loss(**{**arguments, **bad})
