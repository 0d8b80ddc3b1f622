"""fused_linear_policy_loss by Triton kernels on each tile, in the interpreter: values and masks, not hardware."""

import math
from dataclasses import replace

import pytest
import sharded_head
import torch
import triton_cases
from dtypes import DTYPES
from linear_head import count_matmuls, random_head
from linear_loss_cases import OPTIONS, TOKENS, batch_of, by_equations, call, check_against_equations, head_and_batch
from policy_batches import LENGTHS, PRESETS
from triton_cases import random_ids, random_logits

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss
from minirl_kernels.common.triton.scale import scale_in_place
from minirl_kernels.ops.fused_policy_loss import triton as kernels
from minirl_kernels.ops.fused_policy_loss.loss_rows import LossRows
from minirl_kernels.ops.linear_token_logprobs import triton as head
from minirl_kernels.ops.linear_token_logprobs.tiles import gradient_in_place
from minirl_kernels.ops.token_logprobs.rows import LogitRows

pytestmark = triton_cases.interpreter_only()
UNCLIPPED = PolicyLossConfig(clip=False)


@pytest.fixture
def matmuls(monkeypatch):
    return count_matmuls(monkeypatch, head)


@pytest.fixture
def tiles_of_five(monkeypatch):
    monkeypatch.setattr(head, "rows_per_tile", lambda *_: 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype):
    options = dict(options)
    head = random_head(TOKENS, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    check_against_equations(head, batch_of(head, LENGTHS, **options), PolicyLossConfig(), "triton", **options)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("extra", [{}, {"kl_coef": 0.3, "entropy_coef": 0.07}, {"rollout_is": "sequence"}], ids=str)
def test_objectives(preset, extra, tiles_of_five):
    head, batch = head_and_batch(20, 130)
    check_against_equations(head, batch, PolicyLossConfig.preset(preset, **extra), "triton")


@pytest.mark.parametrize("config", [PolicyLossConfig(entropy_coef=0.05), PolicyLossConfig.gspo()], ids=["one", "two"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [20_011, 40_000], ids=["odd", "aligned"])
def test_rows_of_many_blocks(vocab_size, dtype, config):
    """16-bit gradients overwrite float32 logits, of which some are still to be read; in one sweep and in two phases."""
    options = {"logit_softcap": 4.0}
    head = random_head(9, 16, vocab_size, dtype, with_bias=True)
    batch = replace(batch_of(head, [5, 4], **options), loss_mask=torch.ones(9, dtype=torch.bool))
    check_against_equations(head, batch, config, "triton", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 4096, 16_384, 30_001, 40_000])
def test_a_narrower_gradient_in_place_is_that_in_memory_of_its_own(vocab_size, dtype):
    memory = random_logits(4, vocab_size + 5)
    logits = memory[:, :vocab_size]
    ones = torch.ones(4)
    row = LogitRows(logits, random_ids(logits), ones)
    per_token = (None, None, None, torch.tensor([1.0, -1.0, 0.0, -0.3]), ones)
    loss = LossRows(*per_token, "minirl", False, 0.0, 2.0, 5.0, 0.0, "k3", 0.0)
    apart = torch.empty(4, vocab_size, dtype=dtype)
    expected = kernels.forward_backward(row, loss, apart)
    beyond = memory[:, vocab_size:].clone()
    in_place = gradient_in_place(logits, dtype)
    results = kernels.forward_backward(row, loss, in_place)
    assert all(map(torch.equal, results, expected))
    assert torch.equal(in_place, apart)
    assert torch.equal(memory[:, vocab_size:], beyond)


@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_on_policy_without_old_log_probs(preset):
    head, batch = head_and_batch(20, 130)
    batch = replace(batch, old_log_probs=None)
    config = PolicyLossConfig.preset(preset)
    out, grads = call(head, batch, "triton", config=config)
    expected = by_equations(head, batch, config, torch.float64)
    torch.testing.assert_close(out.loss.double(), expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads[0].double(), expected[3], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    head, batch = head_and_batch(4, 7, lengths=[tokens])
    batch = replace(batch, loss_mask=torch.ones(tokens, dtype=torch.bool))
    out, grads = call(head, batch, "triton", config=UNCLIPPED)
    assert [tuple(grad.shape) for grad in grads] == [(tokens, 4), (7, 4)]
    assert bool(grads[1].any()) == bool(tokens)
    assert bool(out.loss) == bool(tokens)


def three_responses(dtype=torch.float32):
    """(head, batch) of three responses on policy, without a mask; the second has zero advantage."""
    head, batch = head_and_batch(12, 40, dtype, lengths=[6, 5, 8])
    return head, replace(
        batch, advantages=torch.tensor([1.0, 0.0, -0.5]), loss_mask=torch.ones(19, dtype=torch.bool),
        old_log_probs=batch.log_probs, rollout_log_probs=batch.log_probs,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_cannot_have_a_gradient_are_left_out(dtype, matmuls):
    head, batch = three_responses(dtype)
    out, grads = call(head, batch, "triton", config=UNCLIPPED)
    assert matmuls == [(19, 12), (14, 40), (40, 14)]
    assert bool((out.entropy > 0).all())
    assert not grads[0][6:11].any()
    check_against_equations(head, batch, UNCLIPPED, "triton")


@pytest.mark.parametrize("config", [replace(UNCLIPPED, entropy_coef=0.1), replace(UNCLIPPED, kl_coef=0.1)], ids=str)
def test_a_bonus_gives_every_row_a_gradient(config, matmuls):
    head, batch = three_responses()
    _, grads = call(head, batch, "triton", config=config)
    assert matmuls == [(19, 12), (19, 40), (40, 19)]
    assert grads[0].any(1).all()
    check_against_equations(head, batch, config, "triton")


def test_in_several_tiles_rows_with_a_gradient_come_first(matmuls, tiles_of_five):
    """14 rows with a gradient fill three tiles of five; the last tile runs no matmul for gradients."""
    head, batch = three_responses()
    check_against_equations(head, batch, UNCLIPPED, "triton")
    one_call = matmuls[: len(matmuls) // 2]
    assert [m for m, k in one_call if k == 12] == [5, 5, 5, 4]
    assert [m for m, k in one_call if k == 40] == [5, 5, 4]
    assert [k for m, k in one_call if m == 40] == [5, 5, 4]


def test_clipped_tokens_add_exactly_nothing():
    head, batch = three_responses()
    batch = replace(batch, advantages=torch.tensor([1.0, 1.0, -0.5]))
    clipped = torch.arange(19) % 3 == 0
    far = torch.where(batch.token_advantages() > 0, -1.0, 1.0)
    batch = replace(batch, old_log_probs=torch.where(clipped, batch.log_probs + far, batch.log_probs))
    out, grads = call(head, batch, "triton", config=PolicyLossConfig())
    assert not out.token_grad[clipped].any()
    assert not grads[0][clipped].any()
    assert grads[0][~clipped].any(1).all()
    check_against_equations(head, batch, PolicyLossConfig(), "triton")


def test_masked_rows_are_not_computed(matmuls):
    head, batch = head_and_batch(12, 40)
    hidden, weight, token_ids, _ = head
    hidden[~batch.loss_mask] = math.nan
    out, grads = call((hidden, weight, token_ids, None), batch, "triton", config=UNCLIPPED)
    assert matmuls[0] == (int(batch.loss_mask.sum()), 12)
    assert all(bool(values.isfinite().all()) for values in (out.loss, out.log_probs, out.entropy, *grads))


@pytest.mark.parametrize("config", [PolicyLossConfig(), PolicyLossConfig.gspo()], ids=["one sweep", "two phases"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_parts_cost_no_matmul(frozen, config, matmuls):
    head, batch = head_and_batch(12, 40)
    _, (grad_hidden, grad_weight) = call(head, batch, "triton", config=config)
    matmuls.clear()
    hidden, weight, token_ids, _ = head
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    out = fused_linear_policy_loss(
        hidden, weight, token_ids, config=config, backend="triton", **batch.arguments("packed")
    )
    if frozen == "both":
        assert not out.loss.requires_grad
        assert len(matmuls) == 1
        return
    leaf, expected = (weight, grad_weight) if frozen == "hidden" else (hidden, grad_hidden)
    assert torch.equal(torch.autograd.grad(out.loss, leaf)[0], expected)
    assert len(matmuls) == (3 if config.is_sequence_level else 2)


@pytest.mark.parametrize("bad", [-1, 40, -101, 2**40])
@pytest.mark.parametrize("row", [2, 8], ids=["a gradient", "no advantage"])
def test_an_id_out_of_range_is_nan(bad, row):
    (hidden, weight, token_ids, _), batch = three_responses()
    expected, _ = call((hidden, weight, token_ids, None), batch, "triton", config=UNCLIPPED)
    token_ids[row] = bad
    out, grads = call((hidden, weight, token_ids, None), batch, "triton", config=UNCLIPPED)
    others = torch.arange(19) != row
    for values, theirs in zip(out[2:], expected[2:], strict=True):
        assert values[row].isnan()
        assert torch.equal(values[others], theirs[others])
    assert out.loss.isnan()
    assert grads[0][row].isnan().all()
    assert grads[0][others].isfinite().all()
    with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row {row}: .*must be in \[0, 40\), or -100"):
        call((hidden, weight, token_ids, None), batch, "triton", config=UNCLIPPED, check=True)


def test_any_grad_output_and_one_backward():
    head, batch = head_and_batch(12, 40)
    _, once = call(head, batch, "triton")
    _, thrice = call(head, batch, "triton", grad_output=3.0)
    for grad, other in zip(once, thrice, strict=True):
        torch.testing.assert_close(other, 3 * grad)


def test_a_bias_can_be_scaled():
    """The backward on a GPU scales the gradient of a bias."""
    grad = random_logits(1001)
    expected = grad * -0.37
    scale_in_place(grad, torch.tensor(-0.37))
    assert torch.equal(grad, expected)


def test_registered_op():
    (hidden, weight, token_ids, bias), batch = head_and_batch(12, 40, with_bias=True)
    tokens = torch.ones(TOKENS)
    torch.library.opcheck(
        torch.ops.minirl_kernels.fused_linear_policy_loss.default,
        (hidden, weight, bias, token_ids, tokens, 0.0, None, None, batch.old_log_probs, None, None, tokens, tokens,
         "grpo", True, 0.8, 1.2, 5.0, 0.0, "k3", 0.0, True, False, True, None, "triton"),
    )  # fmt: skip


def test_vocabulary_over_two_processes():
    sharded_head.run("fused_linear_policy_loss", "triton")
