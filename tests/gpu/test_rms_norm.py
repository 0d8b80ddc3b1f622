"""The Triton kernels of rms_norm on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from rms_norm_cases import check_rms_norm
from row_bits import cancelling
from triton_cases import random_logits

from minirl_kernels.ops.rms_norm.triton import backward, forward

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 257, 1000, 4097, 20_011, 50_257])
def test_any_size(size, dtype):
    check_rms_norm(random_logits(5, size, dtype=dtype), random_logits(size, dtype=dtype, seed=2), device=DEVICE)
    check_rms_norm(random_logits(5, size, dtype=dtype), None, device=DEVICE)


def test_more_than_65535_rows():
    check_rms_norm(random_logits(70_000, 33), random_logits(33, seed=2), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [999, 2048, 20_011])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(size, dtype):
    x = cancelling(257, size, dtype).to(DEVICE)
    grad = random_logits(257, size, dtype=dtype).to(DEVICE)

    def bits(x, grad):
        out, rstd = forward(x, None, 1e-6)
        return out, rstd, backward(grad, x, None, rstd, True, False)[0]

    together = bits(x, grad)
    for rows in (slice(0, 1), slice(17, 20), slice(256, 257), slice(3, 131)):
        alone = bits(x[rows].clone(), grad[rows].clone())
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))


def test_the_gradient_of_the_weight_run_to_run():
    grad = cancelling(513, 9000).T.contiguous().to(DEVICE)
    ones = torch.ones_like(grad)
    runs = [backward(grad, ones, None, ones[:, :1].contiguous(), False, True)[1] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
