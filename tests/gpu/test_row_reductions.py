"""softmax, rms_norm and mean by their Triton kernels, on a GPU: what the interpreter checks, and what only hardware can
say."""

import pytest
import torch
from row_bits import cancelling
from triton_cases import DTYPES, check_mean, check_rms_norm, check_softmax, random_logits

import minirl_kernels as mk
from minirl_kernels.ops.rms_norm.triton_kernel import backward, forward

DEVICE = "cuda"
SIZES = [1, 2, 257, 1000, 4097, 20_011, 50_257, 151_936]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_any_size(size, dtype):
    x = random_logits(5, size, dtype=dtype)
    for log in (False, True):
        check_softmax(x, log, device=DEVICE)
    check_rms_norm(x, random_logits(size, dtype=dtype, seed=2), device=DEVICE)
    for divide in (False, True):
        check_mean(x, -1, divide, device=DEVICE)
        check_mean(x.T.contiguous(), 0, divide, device=DEVICE)
        check_mean(x, None, divide, device=DEVICE)


def test_more_than_65535_rows():
    x = random_logits(70_000, 33)
    for log in (False, True):
        check_softmax(x, log, device=DEVICE)
    check_rms_norm(x, random_logits(33, seed=2), device=DEVICE)
    check_mean(x, -1, True, device=DEVICE)
    check_mean(x, 0, True, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [999, 1024, 50_257])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(size, dtype):
    x = cancelling(257, size, dtype).to(DEVICE)
    logits = random_logits(257, size, dtype=dtype).to(DEVICE)

    def bits(x, logits):
        out, rstd = forward(x, None, 1e-6)
        sums = mk.sum(x, -1, dtype=torch.float32), mk.sum(x.T.contiguous(), 0, dtype=torch.float32)
        grad_x = backward(x, logits, None, torch.ones_like(rstd), True, False)[0]
        return out, rstd, grad_x, *sums, mk.softmax(logits), mk.log_softmax(logits)

    together = bits(x, logits)
    for rows in (slice(0, 1), slice(17, 20), slice(256, 257), slice(3, 131)):
        alone = bits(x[rows].clone(), logits[rows].clone())
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))


def test_the_same_bits_run_to_run_of_what_is_summed_over_rows():
    x, grad = cancelling(9000, 513).to(DEVICE), random_logits(9000, 513).to(DEVICE)
    first, second = (backward(grad, x, None, torch.ones(9000, 1, device=DEVICE), False, True)[1] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(mk.sum(x, None), mk.sum(x, None))


def test_strided_rows():
    x = random_logits(6, 1000).to(DEVICE)
    view = torch.nn.functional.pad(x, (0, 24))[:, :1000]
    for call in (mk.softmax, lambda x: mk.rms_norm(x, None, 1e-6), lambda x: mk.mean(x, 0), lambda x: mk.mean(x, 1)):
        torch.testing.assert_close(call(view), call(x))
