"""The Triton kernels of token_logprobs in Triton's interpreter: values and masks; hardware is not tested."""

import itertools
import math

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from triton_cases import check_token_logprobs, random_ids, random_logits
from verify import bounds
from verify.interpreter import recording
from verify.launches import captured

from minirl_kernels import token_logprobs
from minirl_kernels.ops.token_logprobs.op import token_logprobs_forward
from minirl_kernels.ops.token_logprobs.rows import LogitRows, RowGradients
from minirl_kernels.ops.token_logprobs.triton import backward

pytestmark = triton_cases.interpreter_only()


def gradient(logits, token_ids, **options):
    leaf = logits.detach().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, token_ids, with_entropy=True, backend="triton", **options)
    (grad,) = torch.autograd.grad(log_probs.sum() + 0.5 * entropy.sum(), leaf)
    return log_probs.detach(), entropy.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 5, 31, 257, 1000, 1024, 4097])
def test_any_vocabulary(vocab_size, dtype):
    logits = random_logits(5, vocab_size, dtype=dtype)
    check_token_logprobs(logits, random_ids(logits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [20_011, 24_000], ids=["odd", "aligned"])
def test_rows_of_many_tiles(vocab_size, dtype):
    logits = random_logits(3, vocab_size, dtype=dtype)
    check_token_logprobs(logits, random_ids(logits))


@pytest.mark.parametrize("temperature", [0.3, torch.tensor([0.2, 1.0, 0.7, 5.0, 1.3])], ids=["one", "each"])
def test_temperature(temperature):
    logits = random_logits(5, 1025)
    check_token_logprobs(logits, random_ids(logits), temperature)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_by_their_strides(ids_dtype):
    """[B, L, V] as a slice of a larger tensor, in either order of its outer dimensions."""
    buffer = random_logits(3, 4, 96)
    for logits in (buffer[:, 1:, :90], buffer.transpose(0, 1)[1:, :, 3:80], buffer[:, ::2]):
        check_token_logprobs(logits, random_ids(logits, dtype=ids_dtype))


@pytest.mark.parametrize("with_entropy", [False, True])
def test_entropy_is_optional(with_entropy):
    logits = random_logits(4, 100)
    check_token_logprobs(logits, random_ids(logits), with_entropy=with_entropy)


def test_gradient_of_the_entropy_alone():
    logits = random_logits(3, 50).requires_grad_()
    token_ids = random_ids(logits)
    grads = []
    for backend in ("triton", "reference"):
        entropy = token_logprobs(logits, token_ids, with_entropy=True, backend=backend)[1]
        grads.append(torch.autograd.grad(entropy.sum(), logits)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_zero_tokens(shape):
    logits, token_ids = torch.zeros(*shape, 7), torch.zeros(shape, dtype=torch.int64)
    assert [tuple(values.shape) for values in gradient(logits, token_ids)] == [shape, shape, (*shape, 7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "finite",
    [slice(100, 2000), slice(1500, 2003), slice(7, 8), slice(9_000, 9_100), slice(20_000, 20_003)],
    ids=["a padded vocabulary", "its end", "one logit", "a tile between empty ones", "the last ones"],
)
def test_logits_of_minus_infinity(finite, dtype):
    """Logits of -inf have no probability, no gradient, and no effect on the entropy."""
    vocab_size = 2003 if finite.stop <= 2003 else 20_003
    logits = random_logits(3, vocab_size, dtype=dtype)
    token_ids = torch.full((3,), finite.stop - 1)
    alone = gradient(logits[:, finite], token_ids - finite.start)
    outside = torch.ones(vocab_size, dtype=torch.bool)
    outside[finite] = False
    logits[:, outside] = -math.inf
    log_probs, entropy, grad = gradient(logits, token_ids)
    torch.testing.assert_close(log_probs, alone[0])
    torch.testing.assert_close(entropy, alone[1])
    torch.testing.assert_close(grad[:, finite], alone[2])
    assert not grad[:, outside].any()


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, -1e4), (torch.float32, 1e4), (torch.bfloat16, -1e4), (torch.float16, -6e4)]
)
def test_all_logits_far_from_zero(dtype, offset):
    logits = (random_logits(3, 1025) + offset).to(dtype)
    check_token_logprobs(logits, random_ids(logits))


def test_masked_logits_of_the_lowest_finite_value():
    logits = random_logits(2, 300)
    expected = gradient(logits[:, :200], torch.tensor([3, 199]))
    logits[:, 200:] = torch.finfo(torch.float32).min
    log_probs, entropy, grad = gradient(logits, torch.tensor([3, 199]))
    assert torch.equal(log_probs, expected[0])
    assert torch.equal(entropy, expected[1])
    assert torch.equal(grad[:, :200], expected[2])
    assert not grad[:, 200:].any()


def test_a_token_of_probability_zero():
    log_probs, entropy, grad = gradient(torch.tensor([[-math.inf, 1.0, 2.0]]), torch.tensor([0]))
    assert log_probs.item() == -math.inf
    assert entropy.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("logit", [math.nan, math.inf])
def test_what_is_no_number_makes_its_row_none(logit):
    logits = random_logits(2, 100)
    logits[0, 50] = logit
    log_probs, entropy, grad = gradient(logits, torch.tensor([3, 4]))
    assert log_probs[0].isnan()
    assert entropy[0].isnan()
    assert grad[0, 3].isnan()
    assert all(values[1].isfinite().all() for values in (log_probs, entropy, grad))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_ignored_tokens_are_zero_whatever_their_logits(garbage):
    logits = random_logits(3, 40)
    logits[1] = garbage
    results = gradient(logits, torch.tensor([3, -100, 5]), temperature=torch.tensor([1.0, 0.0, 1.0]))
    for values in results:
        assert not values[1].any()
        assert values[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        *itertools.product([-1, 40, -101, 2**31 - 1, -(2**31)], [torch.int32, torch.int64]),
        *itertools.product([2**32 + 3, 2**40], [torch.int64]),
    ],
    ids=str,
)
def test_an_id_out_of_range_is_nan_and_reads_nothing(bad, dtype):
    logits, token_ids = random_logits(3, 40), torch.tensor([3, 7, 5], dtype=dtype)
    expected = gradient(logits, token_ids)
    token_ids[1] = bad
    with recording() as launches:
        results = gradient(logits, token_ids)
    assert [fault for launch in launches for fault in bounds.outside(launch)] == []
    for values, others in zip(results, expected, strict=True):
        assert values[1].isnan().all()
        assert torch.equal(values[[0, 2]], others[[0, 2]])


def test_check_raises():
    with pytest.raises(ValueError, match=r"^token_ids has the id 40 at row 1"):
        token_logprobs(random_logits(2, 40), torch.tensor([3, 40]), check=True, backend="triton")


def test_gradient_over_the_logits_themselves():
    buffer = random_logits(2, 4, 64, dtype=torch.bfloat16)
    logits = buffer[:, 1:, :50]
    token_ids = random_ids(logits)
    temperature, grads = torch.ones(2, 3), torch.full((2, 3), -0.7)
    _, entropy, shift, log_sum = token_logprobs_forward(logits, token_ids, temperature, True, "triton")
    apart = torch.empty(2, 3, 50, dtype=logits.dtype)
    before = buffer.clone()
    arguments = LogitRows(logits, token_ids, temperature), RowGradients(shift, log_sum, entropy, grads, grads)
    backward(*arguments, apart)
    backward(*arguments, logits)
    assert torch.equal(logits, apart)
    assert torch.equal(buffer[:, :1], before[:, :1])
    assert torch.equal(buffer[..., 50:], before[..., 50:])


def test_the_bits_of_a_row_do_not_depend_on_its_batch():
    """A program of the kernel reads its own row only."""
    logits = random_logits(7, 999, dtype=torch.bfloat16)
    token_ids = random_ids(logits)
    together = gradient(logits, token_ids)
    for row in range(7):
        alone = gradient(logits[row : row + 1], token_ids[row : row + 1])
        assert all(torch.equal(values[row : row + 1], one) for values, one in zip(together, alone, strict=True))


def test_more_tokens_than_a_grid_axis_but_the_first_can_count():
    logits = torch.zeros(1, 16).expand(70_000, 16)
    token_ids = torch.zeros(70_000, dtype=torch.int64)
    with captured() as launches:
        rows = LogitRows(logits, token_ids, torch.ones(70_000))
        values = token_logprobs_forward(*rows, True, "triton")
        backward(rows, RowGradients(*values[2:], *[values[0]] * 3), torch.empty(70_000, 16))
    assert [launch.grid for launch in launches] == [(70_000,), (70_000, 1)]


def test_rows_more_than_2_to_the_31_elements_apart():
    """The memory between the rows is never touched, so the system need not provide it."""
    stride = 2**31 + 48
    logits = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    logits.copy_(random_logits(2, 40, dtype=torch.bfloat16))
    token_ids = torch.tensor([3, 39])
    expected = gradient(logits.contiguous(), token_ids)
    temperature, grads = torch.ones(2), torch.tensor([1.0, 1.0])
    log_probs, entropy, shift, log_sum = token_logprobs_forward(logits, token_ids, temperature, True, "triton")
    gradients = RowGradients(shift, log_sum, entropy, grads, grads / 2)
    backward(LogitRows(logits, token_ids, temperature), gradients, logits)
    for values, others in zip((log_probs, entropy, logits), expected, strict=True):
        assert torch.equal(values, others)
