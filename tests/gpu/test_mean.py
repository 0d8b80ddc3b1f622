"""The Triton kernels of mean and sum on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from row_bits import cancelling
from triton_cases import check_mean, random_logits

import minirl_kernels as mk

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 257, 1000, 4097, 20_011, 50_257, 151_936])
@pytest.mark.parametrize("divide", [False, True], ids=["sum", "mean"])
def test_any_size(divide, size, dtype):
    x = random_logits(5, size, dtype=dtype)
    check_mean(x, -1, divide, device=DEVICE)
    check_mean(x.T.contiguous(), 0, divide, device=DEVICE)
    check_mean(x, None, divide, device=DEVICE)


def test_more_than_65535_rows():
    check_mean(random_logits(70_000, 33), -1, True, device=DEVICE)
    check_mean(random_logits(70_000, 33), 0, True, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [999, 1024, 50_257])
def test_the_bits_of_a_row_or_column_depend_on_nothing_else(size, dtype):
    x = cancelling(257, size, dtype).to(DEVICE)

    def bits(x):
        options = {"dtype": torch.float32}
        return mk.sum(x, -1, **options), mk.sum(x.T.contiguous(), 0, **options), mk.mean(x.T, 0, **options)

    together = bits(x)
    for rows in (slice(0, 1), slice(17, 20), slice(256, 257), slice(3, 131)):
        assert all(torch.equal(values[rows], one) for values, one in zip(together, bits(x[rows].clone()), strict=True))
