"""The Triton kernels of mean and sum in Triton's interpreter: values and masks; hardware is not tested."""

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from row_bits import strided
from triton_cases import check_mean, random_logits
from verify.launches import captured

import minirl_kernels as mk
from minirl_kernels.common.triton.columns import SHORTEST_BLOCK
from minirl_kernels.ops.mean import triton as kernels

pytestmark = triton_cases.interpreter_only()
CALLS = pytest.mark.parametrize("divide", [False, True], ids=["sum", "mean"])
BLOCK = kernels.BLOCK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 257, 1000, 1024, 4097])
@CALLS
def test_rows_and_columns(divide, size, dtype):
    check_mean(random_logits(3, size, dtype=dtype), -1, divide)
    check_mean(random_logits(size, 3, dtype=dtype), 0, divide)


@pytest.mark.parametrize("size", [BLOCK, BLOCK + 1, 2 * BLOCK + 5])
def test_rows_of_many_blocks(size):
    check_mean(random_logits(2, size), -1, True)
    check_mean(random_logits(2, size, dtype=torch.bfloat16), None, False)


@pytest.mark.parametrize("size", [SHORTEST_BLOCK, SHORTEST_BLOCK + 1, 2 * SHORTEST_BLOCK + 5, 1025])
def test_columns_of_many_blocks(size):
    check_mean(random_logits(size, 70), 0, True)
    check_mean(random_logits(2, size, 8, dtype=torch.bfloat16), 1, False)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, (0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3), None])
@CALLS
def test_dimensions(divide, dim):
    check_mean(random_logits(2, 3, 4, 20), dim, divide)


@pytest.mark.parametrize(
    "view", [lambda x: x[:, 1:, 3:], lambda x: x.transpose(0, 1), lambda x: x.mT, lambda x: x[:1].expand(3, -1, -1)]
)
def test_strides(view):
    """A view gives the bits of its copy."""
    x = view(random_logits(2, 4, 40))
    for dim in (0, 1, 2, (0, 1), (0, 2), None):
        found, expected = (mk.sum(values, dim, backend="triton") for values in (x, x.contiguous()))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_dtype(of, to):
    x = random_logits(3, 100, dtype=of)
    found, expected = (mk.mean(x, -1, dtype=to, backend=backend) for backend in ("triton", "reference"))
    assert found.dtype == to
    torch.testing.assert_close(found, expected)


@CALLS
@pytest.mark.filterwarnings("ignore:invalid value")  # a warning of NumPy for 0 / 0
def test_of_nothing(divide):
    ours, theirs = (mk.mean, torch.mean) if divide else (mk.sum, torch.sum)
    for shape, dim in (((0, 5), 0), ((5, 0), -1), ((0, 5), -1), ((5, 0), 0)):
        found = ours(torch.zeros(shape), dim, backend="triton")
        torch.testing.assert_close(found, theirs(torch.zeros(shape), dim), equal_nan=True)


def test_a_row_or_column_looks_at_nothing_but_itself():
    x = random_logits(5, 1100)
    by_row, by_column = (
        mk.sum(strided(values, 13), dim, backend="triton") for values, dim in ((x, -1), (x.T.contiguous(), 0))
    )
    for row in range(5):
        alone = x[row : row + 1]
        assert torch.equal(mk.sum(alone, -1, backend="triton"), by_row[row : row + 1])
        assert torch.equal(mk.sum(alone.T.contiguous(), 0, backend="triton"), by_column[row : row + 1])


@pytest.mark.parametrize(
    ("shape", "dim", "grids"),
    [
        ((70_000, 3), -1, [70_000]),
        ((2, 70_000 * 1024), 0, [70_000]),
        ((70_000, 2, 1023), 1, [70_000 * 8]),
        ((2**31,), 0, [131_072, 8, 1]),
    ],
)
def test_all_programs_are_on_the_first_axis_of_the_grid(shape, dim, grids):
    with captured() as launches:
        mk.sum(torch.empty(shape, dtype=torch.bfloat16), dim, backend="triton")
    assert all(len(launch.grid) == 1 for launch in launches)
    assert [launch.grid[0] for launch in launches] == grids


def test_rows_more_than_2_to_the_31_elements_apart():
    """The memory between the rows is never touched, so the system need not provide it."""
    stride = 2**31 + 48
    x = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    x.copy_(random_logits(2, 40, dtype=torch.bfloat16))
    for dim in (0, 1):
        assert torch.equal(mk.sum(x, dim, backend="triton"), mk.sum(x.contiguous(), dim, backend="triton"))
