"""The Triton kernels of softmax and log_softmax in Triton's interpreter: values and masks; hardware is not tested."""

import math

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from row_bits import strided
from triton_cases import check_softmax, random_logits
from verify.launches import captured

from minirl_kernels import log_softmax, softmax
from minirl_kernels.ops.softmax import triton as kernels

pytestmark = triton_cases.interpreter_only()
CALLS = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 257, 1000, 1024, 4097])
@CALLS
def test_any_size(log, size, dtype):
    check_softmax(random_logits(3, size, dtype=dtype), log)


@pytest.mark.parametrize("size", [20_011, 40_000], ids=["odd", "aligned"])
@CALLS
def test_rows_of_many_tiles(log, size):
    check_softmax(random_logits(2, size), log)
    check_softmax(random_logits(1, size, dtype=torch.bfloat16), log)


@CALLS
def test_any_dimension_and_strides(log):
    x = random_logits(2, 2, 3, 9)
    for view in (x[:, 1:, :, 3:], x.transpose(0, 1), x[0, 0, 0]):
        check_softmax(view, log)
    for dim in (0, 2):
        check_softmax(x, log, dim)


@CALLS
def test_minus_infinity_and_what_is_no_number(log):
    x = random_logits(5, 2003)
    x[0, :1500] = -math.inf
    x[1] = -math.inf
    x[2, 7], x[3, 2002] = math.nan, math.inf
    ours, theirs = (log_softmax, torch.log_softmax) if log else (softmax, torch.softmax)
    out = ours(x, backend="triton")
    torch.testing.assert_close(out, theirs(x, -1), equal_nan=True)
    assert out[1:4].isnan().all()
    assert (out[0, :1500] == (-math.inf if log else 0)).all()


@CALLS
def test_all_far_from_zero(log):
    check_softmax(random_logits(3, 1025) - 1e4, log)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
@CALLS
def test_nothing(log, shape):
    for dim in (0, 1):
        assert (log_softmax if log else softmax)(torch.zeros(shape), dim, backend="triton").shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@CALLS
def test_halves_to_float32_and_back(log, dtype):
    x, grad = random_logits(2, 700, dtype=dtype), random_logits(2, 700)
    out = kernels.forward(x, -1, log, torch.float32)
    torch.testing.assert_close(out, kernels.forward(x.float(), -1, log, torch.float32))
    grad_x = kernels.backward(grad, out, -1, log, dtype)
    torch.testing.assert_close(grad_x, kernels.backward(grad, out, -1, log, torch.float32).to(dtype))


@CALLS
def test_a_row_looks_at_nothing_but_itself(log):
    x, grad = random_logits(5, 999), random_logits(5, 999, seed=1)

    def bits(x, grad):
        out = kernels.forward(x, -1, log, x.dtype)
        return out, kernels.backward(grad, out, -1, log, x.dtype)

    together = bits(strided(x, 13), strided(grad, 5))
    for row in range(5):
        alone = bits(x[row : row + 1], grad[row : row + 1])
        assert all(torch.equal(values[row : row + 1], one) for values, one in zip(together, alone, strict=True))


def test_more_rows_than_a_grid_axis_but_the_first_can_count():
    x = torch.zeros(1, 16).expand(70_000, 16)
    with captured() as launches:
        out = kernels.forward(x, -1, False, x.dtype)
        kernels.backward(out, out, -1, False, x.dtype)
    assert [launch.grid for launch in launches] == [(70_000,), (70_000,)]


def test_rows_more_than_2_to_the_31_elements_apart():
    """The memory between the rows is never touched, so the system need not provide it."""
    stride = 2**31 + 48
    x = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    x.copy_(random_logits(2, 40, dtype=torch.bfloat16))
    out = kernels.forward(x, -1, False, x.dtype)
    assert torch.equal(out, kernels.forward(x.contiguous(), -1, False, x.dtype))
    assert torch.equal(
        kernels.backward(x, out, -1, False, x.dtype),
        kernels.backward(x.contiguous(), out, -1, False, x.dtype),
    )
