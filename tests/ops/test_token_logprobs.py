"""token_logprobs against float64: values, both gradients, rows of every length, and extreme logits."""

import math

import equations
import pytest
import torch
from dtypes import DTYPES
from equations import upstream
from policy_batches import assert_as_exact_as_eager, per_row, random_rows

from minirl_kernels import token_logprobs

# around the widths of vectors and tiles, and beyond one tile
VOCAB_SIZES = [1, 2, 15, 16, 17, 1000, 1023, 1025, 4097, 32000]
META = torch.device("meta")


def forward_backward(logits, token_ids, backend, **options):
    """(log_probs, entropy, gradient of the logits) under gradients of both results that differ from token to token."""
    logits = logits.detach().requires_grad_()
    log_probs, entropy = token_logprobs(logits, token_ids, with_entropy=True, backend=backend, **options)
    (grad,) = torch.autograd.grad((log_probs, entropy), logits, upstream(token_ids))
    return log_probs.detach(), entropy.detach(), grad


def by_equations(logits, token_ids, dtype, temperature=1.0):
    """forward_backward by the equations, for logits [T, V] in `dtype`. The eager path keeps the dtype of the logits."""
    logits = logits.detach().to(torch.float64 if dtype == torch.float64 else logits.dtype).requires_grad_()
    return equations.token_log_probs_and_gradients([logits], logits.to(dtype), token_ids, temperature)


def check_against_equations(logits, token_ids, backend, temperature=1.0):
    ours = forward_backward(logits, token_ids, backend, temperature=temperature)
    exact, eager = (by_equations(logits, token_ids, dtype, temperature) for dtype in (torch.float64, torch.float32))
    for result, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_exact_as_eager(result, theirs, truth, per_row(truth) if truth.dim() == 2 else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_values_and_gradients(vocab_size, dtype, backend):
    check_against_equations(*random_rows((5,), vocab_size, dtype), backend)


@pytest.mark.parametrize(
    "temperature", [0.3, 1.7, torch.tensor([0.2, 1.0, 0.7, 5.0, 1.3])], ids=["low", "high", "each"]
)
def test_temperature(temperature, backend):
    check_against_equations(*random_rows((5,), 1025), backend, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_logit_above_all_others(dtype, backend):
    """The probability of the top token rounds to 1, but its log-probability must stay accurate."""
    logits = torch.full((3, 1000), -20.0, dtype=dtype)
    logits[torch.arange(3), torch.tensor([0, 500, 999])] = 5.0
    check_against_equations(logits, torch.tensor([0, 500, 3]), backend)


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.float32, -1e4), (torch.float32, 1e4), (torch.bfloat16, -1e4), (torch.float16, -6e4), (torch.float16, 6e4)],
)
def test_all_logits_far_from_zero(dtype, offset, backend):
    """A maximum that starts at 0 would make every exponential underflow, or overflow."""
    logits, token_ids = random_rows((4,), 1025)
    check_against_equations((logits + offset).to(dtype), token_ids, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("finite", [slice(2048, 3000), slice(0, 3000), slice(4090, 4097), slice(0, 1)], ids=str)
def test_logits_of_minus_infinity(finite, dtype, backend):
    """Logits of -inf have no effect, entropy included: a padded vocabulary, or whole first blocks of -inf."""
    logits, token_ids = random_rows((3,), 4097, dtype)
    token_ids = token_ids % (finite.stop - finite.start) + finite.start
    padded = torch.full_like(logits, -math.inf)
    padded[:, finite] = logits[:, finite]
    ours = forward_backward(padded, token_ids, backend)
    alone = logits[:, finite]
    exact, eager = (by_equations(alone, token_ids - finite.start, dtype) for dtype in (torch.float64, torch.float32))
    log_probs, entropy, grad = ours
    for result, theirs, truth in zip((log_probs, entropy, grad[:, finite]), eager, exact, strict=True):
        assert_as_exact_as_eager(result, theirs, truth, per_row(truth) if truth.dim() == 2 else None)
    outside = torch.ones(4097, dtype=torch.bool)
    outside[finite] = False
    assert torch.equal(grad[:, outside], torch.zeros_like(grad[:, outside]))


def test_token_of_probability_zero(backend):
    logits = torch.tensor([[-math.inf, 1.0, 2.0]])
    log_probs, entropy, grad = forward_backward(logits, torch.tensor([0]), backend)
    assert log_probs.item() == -math.inf
    assert entropy.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens_are_zero_whatever_their_logits(dtype, garbage, backend):
    logits, token_ids = random_rows((4,), 17, dtype)
    expected = forward_backward(logits, token_ids, backend)
    token_ids[1:3] = -100
    logits[1:3] = garbage
    temperature = torch.tensor([1.0, 0.0, math.nan, 1.0])
    ours = forward_backward(logits, token_ids, backend, temperature=temperature, check=True)
    for result, full in zip(ours, expected, strict=True):
        assert torch.equal(result[[0, 3]], full[[0, 3]])
        assert torch.equal(result[1:3], torch.zeros_like(result[1:3]))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("bad", [-1, 17, -101, 2**31 - 1])
def test_id_out_of_range(bad, check, ids_dtype, backend):
    logits, token_ids = random_rows((2, 3), 17)
    token_ids = token_ids.to(ids_dtype)
    token_ids[1, 1] = bad
    with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row 4: .*must be in \[0, 17\), or -100"):
        token_logprobs(logits, token_ids, check=check, backend=backend)


def test_id_out_of_range_of_int32(backend):
    """2**32 + 3 becomes 3 if it is truncated to 32 bits."""
    logits, token_ids = random_rows((3,), 17)
    token_ids[1] = 2**32 + 3
    with pytest.raises(ValueError, match=r"^token_ids has the id 4294967299 at row 1: "):
        token_logprobs(logits, token_ids, backend=backend)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_zero_tokens(shape, backend):
    results = forward_backward(*random_rows(shape, 17), backend)
    assert [tuple(values.shape) for values in results] == [shape, shape, (*shape, 17)]


def test_more_than_65535_tokens(backend):
    logits, token_ids = random_rows((70_001,), 3)
    log_probs, entropy, grad = forward_backward(logits, token_ids, backend)
    log_p = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(log_probs.double(), log_p.gather(-1, token_ids[:, None])[:, 0], rtol=0, atol=3e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=0, atol=3e-6)
    last = by_equations(logits[-4:], token_ids[-4:], torch.float64)
    tail = forward_backward(logits[-4:], token_ids[-4:], backend)
    for row, values in zip(tail, last, strict=True):
        torch.testing.assert_close(row.double(), values, rtol=0, atol=3e-6)
    assert torch.equal(log_probs[-4:], tail[0])
    assert torch.equal(entropy[-4:], tail[1])
    assert grad.sum(-1).abs().max() < 1e-5


def test_addresses_beyond_2_to_the_31(tmp_path, backend):
    """Rows lie 2^30 elements apart in a sparse file of 6 GiB."""
    stride, vocab_size = 2**30, 1025
    rows, token_ids = random_rows((2, 2), vocab_size, torch.bfloat16)
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=3 * stride + vocab_size, dtype=torch.bfloat16)
    logits = file.as_strided((2, 2, vocab_size), (2 * stride, stride, 1))
    logits.copy_(rows)
    for result, expected in zip(
        forward_backward(logits, token_ids, backend), forward_backward(rows, token_ids, backend), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x[::2],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., 3:17],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[0],
        lambda x: x[:, 0],
    ],
    ids=["slice", "step", "transposed", "vocabulary", "expanded", "first", "column"],
)
def test_outer_strides(view, backend):
    """A view gives the bits of its copy."""
    logits, token_ids = random_rows((4, 5), 20)
    logits = view(logits)
    token_ids = token_ids.flatten()[: logits.shape[:-1].numel()].reshape(logits.shape[:-1]) % logits.shape[-1]
    assert not logits.is_contiguous() or logits.dim() == 2
    strided = forward_backward(logits, token_ids, backend)
    copied = forward_backward(logits.clone(memory_format=torch.contiguous_format), token_ids.clone(), backend)
    assert all(map(torch.equal, strided, copied))


def test_ids_and_temperature_of_any_stride_and_width(backend):
    logits, token_ids = random_rows((4, 6), 19)
    temperature = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    expected = forward_backward(logits, token_ids, backend, temperature=temperature)
    for ids in (token_ids.int(), token_ids.T.contiguous().T, token_ids.int().T.contiguous().T):
        result = forward_backward(logits, ids, backend, temperature=temperature.double().T.contiguous().T)
        assert all(map(torch.equal, result, expected))


def test_a_number_for_a_temperature_is_that_of_every_token(backend):
    logits, token_ids = random_rows((4, 6), 19)
    one = forward_backward(logits, token_ids, backend, temperature=0.7)
    each = forward_backward(logits, token_ids, backend, temperature=torch.full((4, 6), 0.7))
    assert all(map(torch.equal, one, each))


def test_entropy_is_asked_for_or_not(backend):
    logits, token_ids = random_rows((6,), 33)
    log_probs, entropy, _ = forward_backward(logits, token_ids, backend)
    alone = token_logprobs(logits, token_ids, backend=backend)
    assert alone.dtype == entropy.dtype == torch.float32
    assert torch.equal(alone, log_probs)


def test_each_gradient_alone(backend):
    """The gradients of the two results add up to the gradient of both."""
    logits, token_ids = random_rows((6,), 33)
    *_, both = forward_backward(logits, token_ids, backend)
    total = torch.zeros_like(both)
    for which, grad in enumerate(upstream(token_ids)):
        leaf = logits.clone().requires_grad_()
        result = token_logprobs(leaf, token_ids, with_entropy=True, backend=backend)[which]
        total += torch.autograd.grad(result, leaf, grad)[0]
    torch.testing.assert_close(total, both)
    leaf = logits.clone().requires_grad_()
    (alone,) = torch.autograd.grad(token_logprobs(leaf, token_ids, backend=backend).sum(), leaf)
    (beside,) = torch.autograd.grad(token_logprobs(leaf, token_ids, with_entropy=True, backend=backend)[0].sum(), leaf)
    assert torch.equal(alone, beside)


def test_gradient_may_be_taken_twice(backend):
    leaf, token_ids = random_rows((6,), 33)
    logits = leaf.requires_grad_() * 1
    log_probs = token_logprobs(logits, token_ids, backend=backend)
    first, second = (torch.autograd.grad(log_probs.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_changed_logits_have_no_gradient(cpu):
    """The kernels read the logits again in the backward, so changed logits must raise."""
    leaf, token_ids = random_rows((6,), 33)
    logits = leaf.requires_grad_() * 1
    log_probs = token_logprobs(logits, token_ids, backend=cpu)
    logits.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(log_probs.sum(), logits)


def test_no_gradient_where_none_is_wanted(backend):
    logits, token_ids = random_rows((6,), 33)
    assert not token_logprobs(logits, token_ids, backend=backend).requires_grad
    with torch.no_grad():
        assert not token_logprobs(logits.requires_grad_(), token_ids, backend=backend).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(dtype, backend):
    logits, token_ids = random_rows((6,), 33, dtype)
    expected = forward_backward(logits, token_ids, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, forward_backward(logits, token_ids, backend), expected))


LOGITS = torch.zeros(2, 3, 7)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"logits": LOGITS.double()}, TypeError, "logits", "torch.float64", "float32, bfloat16 or float16"),
        ({"logits": LOGITS.long()}, TypeError, "logits", "torch.int64", "float32, bfloat16 or float16"),
        ({"logits": LOGITS.tolist()}, TypeError, "logits", "list", "a tensor"),
        ({"logits": LOGITS[0, 0]}, ValueError, "logits", r"\(7,\)", r"\[T, D\] or \[B, L, D\]"),
        ({"logits": LOGITS[None]}, ValueError, "logits", r"\(1, 2, 3, 7\)", r"\[T, D\] or \[B, L, D\]"),
        ({"logits": LOGITS[..., :0]}, ValueError, "logits", r"\(2, 3, 0\)", "not be empty"),
        ({"logits": LOGITS.mT.contiguous().mT}, ValueError, "logits", r"\(21, 1, 3\)", "contiguous"),
        ({"logits": LOGITS[..., ::2]}, ValueError, "logits", r"\(21, 7, 2\)", "contiguous"),
        ({"token_ids": IDS.float()}, TypeError, "token_ids", "torch.float32", "int32 or int64"),
        ({"token_ids": IDS.to(torch.int16)}, TypeError, "token_ids", "torch.int16", "int32 or int64"),
        ({"token_ids": IDS.tolist()}, TypeError, "token_ids", "list", "a tensor"),
        ({"token_ids": IDS[:, :2]}, ValueError, "token_ids", r"\(2, 2\)", r"\(2, 3\)"),
        ({"token_ids": IDS[..., None]}, ValueError, "token_ids", r"\(2, 3, 1\)", r"\(2, 3\)"),
        ({"token_ids": IDS.to(META)}, ValueError, "token_ids", "meta", "cpu"),
        ({"temperature": 0}, ValueError, "temperature", "0", "above 0"),
        ({"temperature": -0.5}, ValueError, "temperature", "-0.5", "above 0"),
        ({"temperature": math.nan}, ValueError, "temperature", "nan", "above 0"),
        ({"temperature": math.inf}, ValueError, "temperature", "inf", "finite"),
        ({"temperature": True}, TypeError, "temperature", "True", "a number or a tensor"),
        ({"temperature": "1"}, TypeError, "temperature", "'1'", "a number or a tensor"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature", r"\(2,\)", r"\(2, 3\)"),
        ({"temperature": torch.ones(2, 3).long()}, TypeError, "temperature", "torch.int64", "floating point"),
        ({"temperature": torch.ones(2, 3, device=META)}, ValueError, "temperature", "meta", "cpu"),
        ({"temperature": torch.zeros(2, 3), "check": True}, ValueError, "temperature", "0.0", "above 0"),
        ({"temperature": torch.full((2, 3), math.nan), "check": True}, ValueError, "temperature", "nan", "above 0"),
        ({"temperature": torch.full((2, 3), math.inf), "check": True}, ValueError, "temperature", "inf", "finite"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    """Each error names the argument, its value and the permitted values."""
    token_logprobs(LOGITS, IDS, backend=backend)
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        token_logprobs(**{"logits": LOGITS, "token_ids": IDS, "backend": backend, **bad})


@pytest.mark.parametrize("name", ["triton", "cuda", "gpu"])
def test_a_backend_that_cannot_run_is_never_replaced(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises((RuntimeError, ValueError), match=f"'{name}'"):
        token_logprobs(LOGITS, IDS, backend=name)


def test_the_cpu_backend_refuses_tensors_of_another_device():
    with pytest.raises(RuntimeError, match="'cpu' is unavailable: it runs on CPU tensors, these are on meta"):
        token_logprobs(LOGITS.to(META), IDS.to(META), backend="cpu")
