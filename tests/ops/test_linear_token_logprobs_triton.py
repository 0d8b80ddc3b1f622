"""linear_token_logprobs by Triton kernels on each tile, in the interpreter: values and masks, not hardware."""

import math

import pytest
import sharded_head
import torch
import triton_cases
from dtypes import DTYPES
from equations import upstream
from linear_head import count_matmuls, random_head
from linear_logprobs_cases import OPTIONS, call, check_against_equations
from triton_cases import random_ids, random_logits
from verify.launches import captured

from minirl_kernels import linear_token_logprobs
from minirl_kernels.common.triton.config import row_strides
from minirl_kernels.ops.linear_token_logprobs import op as linear_op
from minirl_kernels.ops.linear_token_logprobs import triton as head
from minirl_kernels.ops.linear_token_logprobs.tiles import gradient_in_place
from minirl_kernels.ops.token_logprobs import triton as kernels
from minirl_kernels.ops.token_logprobs.rows import Epilogue, LogitRows, RowGradients

pytestmark = triton_cases.interpreter_only()
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def matmuls(monkeypatch):
    return count_matmuls(monkeypatch, head)


@pytest.fixture
def tiles_of_three(monkeypatch):
    monkeypatch.setattr(head, "rows_per_tile", lambda *_: 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype):
    options = dict(options)
    head = random_head(7, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    head[2][[1, 6]] = -100
    check_against_equations(head, "triton", **options)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [20_011, 40_000], ids=["odd", "aligned"])
def test_rows_of_many_blocks(vocab_size, dtype, options):
    """16-bit gradients overwrite float32 logits, of which some are still to be read."""
    options = dict(options)
    head = random_head(3, 8, vocab_size, dtype, with_bias=options.pop("with_bias", False))
    check_against_equations(head, "triton", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 11, 12])
def test_several_tiles(tokens, dtype, tiles_of_three):
    head = random_head(tokens, 40, 515, dtype, with_bias=True)
    head[2][2::5] = -100
    check_against_equations(head, "triton", logit_softcap=4.0)


def test_one_token():
    check_against_equations(random_head(1, 16, 515), "triton")


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_zero_tokens(shape):
    results = call(torch.ones(*shape, 4), torch.ones(7, 4), torch.zeros(shape, dtype=torch.int64), None, "triton")
    assert [tuple(values.shape) for values in results] == [shape, shape, (*shape, 4), (7, 4)]
    assert not results[-1].any()


def test_no_token_counts():
    hidden, weight, token_ids, _ = random_head(4, 9, 33)
    for values in call(hidden, weight, token_ids.fill_(-100), None, "triton"):
        assert not values.any()


def test_a_batch_is_its_rows():
    hidden, weight, token_ids, _ = random_head(12, 9, 33)
    flat = call(hidden, weight, token_ids, None, "triton")
    shaped = call(hidden.view(3, 4, 9), weight, token_ids.view(3, 4).int(), None, "triton")
    for ours, theirs in zip(shaped, flat, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs.flatten())


def test_rows_without_a_token_or_a_gradient_are_left_out(matmuls):
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    token_ids[1] = -100
    hidden[1] = math.nan
    grad = torch.tensor([1.0, 2.0, 0.0, 0.0, -1.0, 0.0])
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    log_probs = linear_token_logprobs(*leaves, token_ids, backend="triton")
    grads = torch.autograd.grad(log_probs, leaves, grad)
    assert matmuls == [(5, 9), (2, 9), (2, 33), (33, 2)]  # logits; logits of two rows again, d hidden, d weight
    assert not grads[0][[1, 2, 3, 5]].any()
    assert all(values.isfinite().all() for values in (log_probs, *grads))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts_cost_no_matmul(frozen, matmuls):
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    full = call(hidden, weight, token_ids, None, "triton", with_entropy=False)
    matmuls.clear()
    leaf = (weight if frozen == "hidden" else hidden).requires_grad_()
    log_probs = linear_token_logprobs(hidden, weight, token_ids, backend="triton")
    (grad,) = torch.autograd.grad(log_probs, leaf, upstream(token_ids)[0])
    assert torch.equal(grad, full[3 if frozen == "hidden" else 2])
    assert len(matmuls) == 3


def test_padded_vocabulary():
    """A token with a bias of -inf does not exist."""
    hidden, weight, token_ids, bias = random_head(5, 8, 40, with_bias=True)
    token_ids %= 30
    bias[30:] = -torch.inf
    padded = call(hidden, weight, token_ids, bias, "triton")
    alone = call(hidden, weight[:30], token_ids, bias[:30], "triton")
    for ours, theirs in zip(padded[:3], alone[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(padded[3:], alone[3:], strict=True):
        torch.testing.assert_close(ours[:30], theirs)
        assert not ours[30:].any()


@pytest.mark.parametrize("logit", [0.0, 1e-4, 0.63, 0.65, 2.0, 30.0, 1e4, math.inf, math.nan])
def test_softcap(logit):
    """softcap agrees with torch's tanh on both branches and at their ends."""
    x = torch.tensor([[0.3, logit], [0.3, -logit]]).requires_grad_()
    capped = 1.5 * torch.tanh(x / 1.5)
    expected = torch.log_softmax(capped, -1)[:, 1]
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    ones, epilogue = torch.ones(2), Epilogue(softcap=1.5)
    rows = LogitRows(x.detach(), torch.tensor([1, 1]), ones)
    ours, _, shift, log_sum = kernels.forward(rows, False, epilogue)
    grad = torch.empty(2, 2)
    kernels.backward(rows, RowGradients(shift, log_sum, ones, ones, None), grad, epilogue)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-6, atol=3e-7, equal_nan=True)
    torch.testing.assert_close(grad, expected_grad, rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("head", [{}, {"softcap": 3.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 4096, 9001, 30_000])
def test_a_narrower_gradient_in_place_is_the_gradient_rounded(vocab_size, dtype, head):
    memory = random_logits(4, vocab_size + 5)
    logits = memory[:, :vocab_size]
    rows, grads = LogitRows(logits, random_ids(logits), torch.full((4,), 0.8)), torch.tensor([1.0, -1.0, 0.0, -0.3])
    _, entropy, shift, log_sum = kernels.forward(rows, True, Epilogue(**head))
    gradients = RowGradients(shift, log_sum, entropy, grads, grads.flip(0))
    apart = torch.empty(4, vocab_size)
    kernels.backward(rows, gradients, apart, Epilogue(**head))
    beyond = memory[:, vocab_size:].clone()
    in_place = gradient_in_place(logits, dtype)
    kernels.backward(rows, gradients, in_place, Epilogue(**head))
    assert torch.equal(in_place, apart.to(dtype))
    assert torch.equal(memory[:, vocab_size:], beyond)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [-1, 33, -101, 2**40])
def test_an_id_out_of_range_is_nan(bad, dtype, tiles_of_three):
    hidden, weight, token_ids, _ = random_head(7, 9, 33, dtype)
    expected = call(hidden, weight, token_ids, None, "triton")
    token_ids[4] = bad
    results = call(hidden, weight, token_ids, None, "triton")
    others = torch.arange(7) != 4
    for values, theirs in zip(results[:3], expected[:3], strict=True):
        assert values[4].isnan().all()
        assert torch.equal(values[others], theirs[others])
    assert results[3].isnan().all()
    with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row 4: .*must be in \[0, 33\), or -100"):
        linear_token_logprobs(hidden, weight, token_ids, check=True, backend="triton")


def test_under_autocast():
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    expected = call(hidden.bfloat16(), weight.bfloat16(), token_ids, None, "triton")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        outs = linear_token_logprobs(*leaves, token_ids, with_entropy=True, backend="triton")
    ours = [*outs, *torch.autograd.grad(outs, leaves, upstream(token_ids))]
    assert all(torch.equal(a, b.float()) for a, b in zip(ours, expected, strict=True))


def test_registered_ops():
    hidden, weight, token_ids, bias = random_head(6, 9, 33, with_bias=True)
    temperature = torch.ones(6)
    forward = (hidden, weight, bias, token_ids, temperature, 0.0, None, None, True, "triton")
    torch.library.opcheck(torch.ops.minirl_kernels.linear_token_logprobs.default, forward)
    _, entropy, shift, log_sum = linear_op.linear_token_logprobs_forward(*forward)
    backward = (*forward[:8], shift, log_sum, entropy, *upstream(token_ids), True, True, True, "triton")
    torch.library.opcheck(torch.ops.minirl_kernels.linear_token_logprobs_backward.default, backward)


def test_vocabulary_over_two_processes():
    sharded_head.run("linear_token_logprobs", "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 1025, 4097, 20_000])
def test_rows_per_tile(tokens, dtype):
    """The tiles hold all rows and have nearly equal sizes. Their per-token arguments begin at multiples of 16 bytes."""
    size = head.rows_per_tile(tokens, torch.empty(0, 4, dtype=dtype))
    assert size <= min(head.MOST_ROWS[dtype], tokens)
    if size < tokens:
        assert size % 128 == 0
        tiles = -(-tokens // size)
        assert tiles == -(-tokens // head.MOST_ROWS[dtype])
        assert tokens - (tiles - 1) * size > 0


@pytest.mark.parametrize(("vocab_size", "aligned"), [(515, False), (512, True)])
def test_rows_of_a_tile_begin_where_any_access_can(vocab_size, aligned):
    """Rows of a tile are aligned for any V. With an odd V only the accesses are narrow."""
    hidden, weight, token_ids, _ = random_head(3, 8, vocab_size, torch.bfloat16)
    with captured() as launches:
        linear_token_logprobs(hidden, weight, token_ids, backend="triton")
    (launch,) = launches
    assert row_strides(launch.args[0])[2] * 4 % 64 == 0
    assert (launch.kwargs["ALIGN"] > 1) == aligned
