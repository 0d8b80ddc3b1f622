"""The Triton kernels of token_logprobs on a GPU: the interpreter's checks, and checks that need hardware."""

import math

import pytest
import torch
from dtypes import DTYPES
from triton_cases import check_token_logprobs, random_ids, random_logits

from minirl_kernels import token_logprobs

DEVICE = "cuda"


def gradient(logits, token_ids, **options):
    leaf = logits.detach().requires_grad_()
    log_probs, entropy = token_logprobs(leaf, token_ids, with_entropy=True, **options)
    (grad,) = torch.autograd.grad(log_probs.sum() + 0.5 * entropy.sum(), leaf)
    return log_probs.detach(), entropy.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 257, 1000, 4097, 20_011, 32_000, 50_257, 128_256, 151_936])
def test_any_vocabulary(vocab_size, dtype):
    logits = random_logits(5, vocab_size, dtype=dtype)
    check_token_logprobs(logits, random_ids(logits), device=DEVICE)


@pytest.mark.parametrize("temperature", [0.3, torch.tensor([0.2, 1.0, 0.7, 5.0, 1.3])], ids=["one", "each"])
def test_temperature(temperature):
    logits = random_logits(5, 1025)
    check_token_logprobs(logits, random_ids(logits), temperature, device=DEVICE)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_by_their_strides(ids_dtype):
    buffer = random_logits(3, 4, 96)
    for logits in (buffer[:, 1:, :90], buffer.transpose(0, 1)[1:, :, 3:80], buffer[:, ::2]):
        check_token_logprobs(logits, random_ids(logits, dtype=ids_dtype), device=DEVICE)


@pytest.mark.parametrize(
    ("dtype", "offset"), [(torch.float32, -1e4), (torch.float32, 1e4), (torch.bfloat16, -1e4), (torch.float16, -6e4)]
)
def test_all_logits_far_from_zero(dtype, offset):
    logits = (random_logits(3, 1025) + offset).to(dtype)
    check_token_logprobs(logits, random_ids(logits), device=DEVICE)


@pytest.mark.parametrize("finite", [slice(100, 2000), slice(9_000, 9_100), slice(20_000, 20_003)], ids=str)
def test_logits_of_minus_infinity(finite):
    logits = random_logits(3, 20_003).to(DEVICE)
    token_ids = torch.full((3,), finite.stop - 1, device=DEVICE)
    alone = gradient(logits[:, finite], token_ids - finite.start)
    outside = torch.ones(20_003, dtype=torch.bool)
    outside[finite] = False
    logits[:, outside] = -math.inf
    log_probs, entropy, grad = gradient(logits, token_ids)
    for values, others in zip((log_probs, entropy, grad[:, finite]), alone, strict=True):
        torch.testing.assert_close(values, others)
    assert not grad[:, outside].any()


@pytest.mark.parametrize("bad", [-1, 40, -101, 2**40])
def test_an_id_out_of_range_is_nan_or_raises(bad):
    logits, token_ids = random_logits(3, 40).to(DEVICE), torch.tensor([3, 7, 5], device=DEVICE)
    expected = gradient(logits, token_ids)
    token_ids[1] = bad
    for values, others in zip(gradient(logits, token_ids), expected, strict=True):
        assert values[1].isnan().all()
        assert torch.equal(values[[0, 2]], others[[0, 2]])
    with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row 1"):
        gradient(logits, token_ids, check=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [999, 151_936])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(vocab_size, dtype):
    logits = random_logits(300, vocab_size, dtype=dtype).to(DEVICE)
    token_ids = random_ids(logits.cpu()).to(DEVICE)
    together = gradient(logits, token_ids)
    for rows in (slice(0, 1), slice(17, 20), slice(299, 300), slice(0, 300)):
        alone = gradient(logits[rows].clone(), token_ids[rows])
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))


def test_more_than_65535_tokens():
    logits = random_logits(70_000, 33).to(DEVICE)
    token_ids = random_ids(logits.cpu()).to(DEVICE)
    results, expected = (gradient(logits, token_ids, backend=backend) for backend in ("triton", "reference"))
    for values, others in zip(results, expected, strict=True):
        torch.testing.assert_close(values, others, rtol=1e-5, atol=1e-5)


def test_rows_more_than_2_to_the_31_elements_apart():
    stride = 2**31 + 48
    try:
        logits = torch.empty(stride + 40, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 40), (stride, 1))
    except torch.OutOfMemoryError:
        pytest.skip("needs 4.3 GB of GPU memory")
    logits.copy_(random_logits(2, 40))
    token_ids = torch.tensor([3, 39], device=DEVICE)
    for values, others in zip(gradient(logits, token_ids), gradient(logits.contiguous(), token_ids), strict=True):
        assert torch.equal(values, others)
