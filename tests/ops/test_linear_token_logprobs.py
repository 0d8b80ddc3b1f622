"""linear_token_logprobs against float64: values and gradients in every dtype and option, bits, invalid arguments."""

import pytest
import sharded_head
import torch
from dtypes import DTYPES
from equations import upstream
from linear_head import TINY_TEMPERATURE, cancelling_head, random_head
from linear_logprobs_cases import OPTIONS, call, check_against_equations

from minirl_kernels import linear_token_logprobs, token_logprobs
from minirl_kernels.ops.linear_token_logprobs import cpu
from minirl_kernels.ops.linear_token_logprobs import op as linear_op
from minirl_kernels.ops.linear_token_logprobs.head import prepare_head
from minirl_kernels.ops.linear_token_logprobs.tiles import logit_tiles

META = torch.device("meta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype, backend):
    options = dict(options)
    head = random_head(7, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    check_against_equations(head, backend, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 3, 5), (5, 17, 33), (3, 513, 16), (30, 8, 4099)], ids=str)
def test_odd_sizes(sizes, dtype, backend):
    check_against_equations(random_head(*sizes, dtype), backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_zero_tokens(shape, backend):
    results = call(torch.ones(*shape, 4), torch.ones(7, 4), torch.zeros(shape, dtype=torch.int64), None, backend)
    assert [tuple(values.shape) for values in results] == [shape, shape, (*shape, 4), (7, 4)]
    assert torch.equal(results[-1], torch.zeros(7, 4))


def test_ignored_tokens_are_zero_whatever_their_hidden_state(backend):
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    expected = call(hidden[[0, 3, 5]], weight, token_ids[[0, 3, 5]], None, backend, with_entropy=False)
    ignored = [1, 2, 4]
    token_ids[ignored] = -100
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_probs = linear_token_logprobs(*leaves, token_ids, backend=backend)
    grads = torch.autograd.grad(log_probs, leaves, upstream(token_ids)[0])
    for values in (log_probs.detach(), grads[0]):
        assert torch.equal(values[ignored], torch.zeros_like(values[ignored]))
    torch.testing.assert_close(log_probs.detach()[[0, 3, 5]], expected[0])


def test_rows_without_a_gradient_are_left_out(monkeypatch):
    """No matmul of the backward reads the hidden states of rows without a gradient."""
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    grad = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.0, 0.5])
    counts = grad != 0

    def gradients(rows, grad):
        leaves = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(linear_token_logprobs(*leaves, token_ids[rows]), leaves, grad)

    depths = []
    matmul_into = cpu.matmul_into
    monkeypatch.setattr(
        cpu, "matmul_into", lambda out, a, b, **kw: (depths.append(a.shape), matmul_into(out, a, b, **kw))[1]
    )
    grad_hidden, grad_weight = gradients(slice(None), grad)
    assert depths == [(6, 9), (3, 9), (3, 33), (33, 3)]  # logits; logits of three rows again, d hidden, d weight
    alone = gradients(counts, grad[counts])
    assert torch.equal(grad_hidden[counts], alone[0])
    assert torch.equal(grad_hidden[~counts], torch.zeros(3, 9))
    assert torch.equal(grad_weight, alone[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_token_alone(dtype, threads, monkeypatch):
    hidden, weight, token_ids = cancelling_head(50, 300, 700, dtype)
    threads(1)
    whole = call(hidden, weight, token_ids, None, "cpu", temperature=TINY_TEMPERATURE)[:3]
    assert all(values.unique().numel() > 20 for values in whole)

    def rows_equal(rows, others):
        return all(torch.equal(ours[rows], theirs) for ours, theirs in zip(whole, others, strict=True))

    grads = upstream(token_ids)
    for rows in (slice(0, 1), slice(8, 11), slice(48, 50), slice(0, 50)):
        leaves = hidden[rows].clone().requires_grad_(), weight
        outs = linear_token_logprobs(*leaves, token_ids[rows], with_entropy=True, temperature=TINY_TEMPERATURE)
        (grad,) = torch.autograd.grad(outs, leaves[:1], [values[rows] for values in grads])
        assert rows_equal(rows, (*(out.detach() for out in outs), grad))
    threads(2)
    assert rows_equal(slice(None), call(hidden, weight, token_ids, None, "cpu", temperature=TINY_TEMPERATURE)[:3])
    monkeypatch.setattr(cpu, "rows_per_tile", lambda *_: 7)
    assert rows_equal(slice(None), call(hidden, weight, token_ids, None, "cpu", temperature=TINY_TEMPERATURE)[:3])


def test_equal_to_token_logprobs_of_the_same_logits():
    hidden, weight, token_ids, _ = random_head(20, 16, 500)
    rows = prepare_head(hidden, weight, token_ids, None, 1.0, None, 1.0, None, None).rows(token_ids)
    tiles = [tile.logits.clone() for _, tile in logit_tiles(cpu, rows)]
    expected = token_logprobs(torch.cat(tiles), token_ids, with_entropy=True)
    ours = linear_token_logprobs(hidden, weight, token_ids, with_entropy=True)
    assert all(map(torch.equal, ours, expected))


def test_padded_vocabulary(backend):
    """A token with a bias of -inf does not exist."""
    hidden, weight, token_ids, bias = random_head(5, 8, 40, with_bias=True)
    token_ids %= 30
    bias[30:] = -torch.inf
    padded = call(hidden, weight, token_ids, bias, backend)
    alone = call(hidden, weight[:30], token_ids, bias[:30], backend)
    for ours, theirs in zip(padded[:3], alone[:3], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(padded[3][:30], alone[3])
    assert torch.equal(padded[3][30:], torch.zeros(10, 8))
    assert torch.equal(padded[4][30:], torch.zeros(10))


def test_tied_embeddings(backend):
    """The head is the embedding: the gradients of both uses add up."""
    gen = torch.Generator().manual_seed(0)
    table = torch.randn(30, 8, generator=gen).requires_grad_()
    tokens, targets = torch.randint(30, (2, 6), generator=gen)
    loss = linear_token_logprobs(table[tokens], table, targets, backend=backend).sum()
    (ours,) = torch.autograd.grad(loss, table)
    log_p = torch.log_softmax(table[tokens] @ table.T, -1).gather(-1, targets[:, None])
    torch.testing.assert_close(ours, torch.autograd.grad(log_p.sum(), table)[0])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_parts_cost_no_matmul(frozen, monkeypatch):
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    full = call(hidden, weight, token_ids, None, "cpu", with_entropy=False)
    count = []
    matmul_into = cpu.matmul_into
    monkeypatch.setattr(cpu, "matmul_into", lambda *a, **kw: (count.append(1), matmul_into(*a, **kw))[1])
    leaf = (weight if frozen == "hidden" else hidden).requires_grad_()
    log_probs = linear_token_logprobs(hidden, weight, token_ids)
    (grad,) = torch.autograd.grad(log_probs, leaf, upstream(token_ids)[0])
    assert torch.equal(grad, full[3 if frozen == "hidden" else 2])
    assert len(count) == 3


def test_a_batch_is_its_rows(backend):
    hidden, weight, token_ids, _ = random_head(12, 9, 33)
    flat = call(hidden, weight, token_ids, None, backend)
    shaped = call(hidden.view(3, 4, 9), weight, token_ids.view(3, 4), None, backend)
    for ours, theirs in zip(shaped, flat, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs.flatten())


def test_under_autocast(backend):
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    expected = call(hidden.bfloat16(), weight.bfloat16(), token_ids, None, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        outs = linear_token_logprobs(*leaves, token_ids, with_entropy=True, backend=backend)
    ours = [*outs, *torch.autograd.grad(outs, leaves, upstream(token_ids))]
    assert [values.dtype for values in ours] == [torch.float32] * 4
    assert all(torch.equal(a, b.float()) for a, b in zip(ours, expected, strict=True))


def test_registered_ops():
    hidden, weight, token_ids, bias = random_head(6, 9, 33, with_bias=True)
    temperature = torch.ones(6)
    forward = (hidden, weight, bias, token_ids, temperature, 0.0, None, None, True, "cpu")
    torch.library.opcheck(torch.ops.minirl_kernels.linear_token_logprobs.default, forward)
    _, entropy, shift, log_sum = linear_op.linear_token_logprobs_forward(*forward)
    backward = (*forward[:8], shift, log_sum, entropy, *upstream(token_ids), True, True, True, "cpu")
    torch.library.opcheck(torch.ops.minirl_kernels.linear_token_logprobs_backward.default, backward)


def test_compiles_whole():
    hidden, weight, token_ids, _ = random_head(6, 9, 33)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    def loss(hidden, weight):
        log_probs, entropy = linear_token_logprobs(hidden, weight, token_ids, with_entropy=True, temperature=0.8)
        return (log_probs * 2 - entropy).sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True)(*leaves)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vocabulary_over_two_processes():
    sharded_head.run("linear_token_logprobs")


@pytest.mark.parametrize("check", [False, True])
def test_id_out_of_range(check, backend, monkeypatch):
    monkeypatch.setattr(cpu, "rows_per_tile", lambda *_: 2)
    hidden, weight, token_ids, _ = random_head(6, 4, 17)
    token_ids[0], token_ids[4] = -100, 17
    with pytest.raises(ValueError, match=r"^token_ids has the id 17 at row 4: .*must be in \[0, 17\), or -100"):
        linear_token_logprobs(hidden, weight, token_ids, check=check, backend=backend)


HIDDEN, WEIGHT, IDS = torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"hidden": HIDDEN.double()}, TypeError, "hidden", "torch.float64", "float32, bfloat16 or float16"),
        ({"hidden": HIDDEN[0, 0]}, ValueError, "hidden", r"\(5,\)", r"\[T, D\]"),
        ({"hidden": HIDDEN.tolist()}, TypeError, "hidden", "list", "a tensor"),
        ({"weight": WEIGHT.bfloat16()}, TypeError, "weight", "torch.bfloat16", "torch.float32"),
        ({"weight": WEIGHT[:, :4]}, ValueError, "weight", r"\(7, 4\)", r"\[V, 5\]"),
        ({"weight": WEIGHT[:0]}, ValueError, "weight", r"\(0, 5\)", "not be empty"),
        ({"weight": WEIGHT.T.contiguous().T}, ValueError, "weight", r"\(1, 7\)", "contiguous"),
        ({"weight": WEIGHT.to(META)}, ValueError, "weight", "meta", "cpu"),
        ({"bias": torch.zeros(5)}, ValueError, "bias", r"\(5,\)", r"\[7\]"),
        ({"bias": torch.zeros(7).long()}, TypeError, "bias", "torch.int64", "floating point"),
        ({"token_ids": IDS.float()}, TypeError, "token_ids", "torch.float32", "int32 or int64"),
        ({"token_ids": IDS[0]}, ValueError, "token_ids", r"\(3,\)", r"\(2, 3\)"),
        ({"temperature": 0}, ValueError, "temperature", "0", "above 0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale", "0.0", "above 0"),
        ({"logit_scale": "2"}, TypeError, "logit_scale", "'2'", "a number"),
        ({"logit_softcap": -3}, ValueError, "logit_softcap", "-3", "above 0"),
        ({"logit_softcap": True}, TypeError, "logit_softcap", "True", "a number"),
        ({"backend": "cuda"}, ValueError, "backend", "'cuda'", "auto, reference, cpu, triton"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "token_ids": IDS, "backend": backend}
    linear_token_logprobs(**arguments)
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        linear_token_logprobs(**{**arguments, **bad})
