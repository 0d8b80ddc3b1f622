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


def strided_on_gpu(x, padding, offset):
    """A copy of the rows with `padding` elements between two rows, `offset` elements into aligned memory."""
    rows, size = x.shape
    storage = torch.full((rows * (size + padding) + offset,), 7.0, dtype=x.dtype, device=DEVICE)
    return storage.as_strided((rows, size), (size + padding, 1), offset).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [100, 999, 20_000])
def test_a_column_has_the_same_bits_beside_any_number_of_columns(rows, dtype):
    """Also with odd strides and with memory that starts off by one element; each count of columns up to 300."""
    x = cancelling(300, rows, dtype).T.contiguous().to(DEVICE)

    def bits(x):
        return mk.sum(x, 0, dtype=torch.float32), mk.mean(x, 0, dtype=torch.float32)

    together = bits(x)
    for count in range(1, 301):
        assert all(torch.equal(one, whole[:count]) for one, whole in zip(bits(x[:, :count]), together, strict=True))
        copy = x[:, :count].contiguous()
        assert all(torch.equal(one, whole[:count]) for one, whole in zip(bits(copy), together, strict=True))
    for padding, offset in ((0, 1), (1, 0), (3, 1), (4, 4), (8, 8)):
        assert all(map(torch.equal, bits(strided_on_gpu(x, padding, offset)), together))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_accesses_give_the_bits_of_single_columns(dtype):
    """Many columns are read by 128 bits each, and few columns or odd addresses one by one."""
    many = 2**18
    x = cancelling(64, 257, dtype).T.contiguous().to(DEVICE).repeat(1, many // 64)
    together = mk.sum(x, 0, dtype=torch.float32)
    assert torch.equal(together, mk.sum(x[:, :64].contiguous(), 0, dtype=torch.float32).repeat(many // 64))
    assert torch.equal(together, mk.sum(strided_on_gpu(x, 3, 1), 0, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_interpreter_and_the_gpu_have_one_order_of_columns(dtype):
    """Rows one by one in blocks of 128, then the blocks one by one."""
    x = cancelling(70, 1000, dtype).T.contiguous()
    blocks = [sum(block.float().unbind(0), torch.zeros(70)) for block in x.split(128)]
    expected = sum(blocks, torch.zeros(70))
    assert torch.equal(mk.sum(x.to(DEVICE), 0, dtype=torch.float32).cpu(), expected)
