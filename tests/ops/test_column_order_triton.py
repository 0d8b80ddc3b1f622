"""The order of a sum of columns on a GPU, in Triton's interpreter: rows one by one, then blocks of rows one by one."""

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from row_bits import cancelling, strided

pytest.importorskip("triton", reason="triton is not installed")

import minirl_kernels as mk
from minirl_kernels.common.triton import columns
from minirl_kernels.ops.rms_norm import triton as rms_norm

pytestmark = triton_cases.interpreter_only()
ROWS = [1, 100, 128, 129, 1000]
COLUMNS = [1, 3, 8, 63, 64, 129, 200]


@pytest.fixture(params=["one column", "16 bytes"])
def per_lane(request, monkeypatch):
    """Every launch has this tile, if the tensors fit it. Otherwise the number of columns chooses."""
    least = {"one column": 2**62, "16 bytes": 0}[request.param]
    monkeypatch.setattr(columns, "LEAST_WIDE_LANES", least)


def one_by_one(rows):
    total = torch.zeros_like(rows[0])
    for row in rows:
        total = total + row
    return total


def in_order(terms):
    """The sum of float32 terms [R, N] over R. Blocks have 128 rows, or the next power of two with R <= rows**2."""
    length = max(128, 2 ** next(n for n in range(40) if 4**n >= len(terms)))
    return one_by_one([one_by_one(block) for block in terms.split(length)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_a_column_is_summed_row_by_row(rows, dtype, per_lane):
    x = cancelling(8, rows, dtype).T.contiguous()
    expected = in_order(x.float())
    assert torch.equal(mk.sum(x, 0, dtype=torch.float32, backend="triton"), expected)
    assert torch.equal(mk.mean(x, 0, dtype=torch.float32, backend="triton"), expected / rows)


@pytest.mark.parametrize("rows", [16_384, 16_385])
def test_many_rows_have_longer_blocks(rows):
    x = cancelling(2, rows, torch.bfloat16).T.contiguous()
    assert torch.equal(mk.sum(x, 0, dtype=torch.float32, backend="triton"), in_order(x.float()))


def test_the_data_would_show_another_order():
    x = cancelling(70, 1000).T.contiguous()
    assert (x.sum(0) != in_order(x)).float().mean() > 0.5
    assert (one_by_one(x) != in_order(x)).float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_depends_on_no_other_column_nor_on_its_place(dtype, per_lane):
    """Any number of columns, odd strides, memory that starts off by one, and matrices one after another."""
    x = cancelling(300, 150, dtype).T.contiguous()
    expected = in_order(x.float())

    def bits(x, dim=0):
        return mk.sum(x, dim, dtype=torch.float32, backend="triton")

    for count in COLUMNS:
        assert torch.equal(bits(x[:, :count].contiguous()), expected[:count])
    for padding, offset in ((0, 1), (1, 0), (3, 1), (8, 8)):
        assert torch.equal(bits(strided(x, padding, offset)), expected)
    assert torch.equal(bits(x.view(150, 3, 100).transpose(0, 1).contiguous(), 1), expected.view(3, 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 129, 1000])
def test_the_gradient_of_the_weight_is_summed_row_by_row(rows, dtype, per_lane):
    """The interpreter rounds the product of a fused multiply-add."""
    grad, x = cancelling(8, rows, dtype).T.contiguous(), cancelling(8, rows, dtype, seed=1).T.contiguous()
    rstd = torch.rand(rows, 1, generator=torch.Generator().manual_seed(2))
    expected = in_order(grad.float() * (x.float() * rstd))
    assert torch.equal(rms_norm.backward(grad, x, None, rstd, False, True)[1], expected)


@pytest.mark.parametrize("shape", [(150, 1), (3, 50), (75, 2)], ids=str)
def test_the_gradient_of_the_weight_at_any_strides(shape, per_lane):
    """The rows of a batch entry and the entries have strides of their own, and blocks begin inside an entry."""
    grad, x = cancelling(40, 150).T.contiguous(), cancelling(40, 150, seed=1).T.contiguous()
    rstd = torch.rand(150, 1, generator=torch.Generator().manual_seed(2))
    _, expected = rms_norm.backward(grad, x, None, rstd, False, True)
    batch, length = shape

    def spread(values, entry, row):
        return torch.zeros(batch, length + entry, 40 + row)[:, :length, :40].copy_(values.view(batch, length, 40))

    for entry, row in ((1, 0), (0, 1), (2, 8)):
        views = spread(grad, entry, row), spread(x, 2 * entry, 3)
        assert torch.equal(rms_norm.backward(*views, None, rstd, False, True)[1], expected)
    for count in (1, 3, 39):
        parts = (grad[:, :count], x[:, :count])
        assert torch.equal(rms_norm.backward(*parts, None, rstd, False, True)[1], expected[:count])
