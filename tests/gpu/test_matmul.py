"""The Triton kernel of matmul, linear and bmm on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from matmul_cases import cancelling, check_a_row_in_any_batch_and_place, check_bmm, check_linear, check_matmul, matrix

from minirl_kernels import matmul
from minirl_kernels.ops.matmul import aten

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 70, 33), (130, 3, 530), (300, 264, 1024), (65, 8200, 72)], ids=str)
def test_matmul(sizes, dtype):
    check_matmul(sizes, dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bmm(dtype):
    check_bmm((3, 170, 33, 200), dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype):
    check_linear((2, 90), (136, 512), dtype, "triton", DEVICE)


@pytest.mark.parametrize("columns", [70, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_any_batch_and_place(dtype, columns):
    counts = [*range(1, 258, 16), 255, 256]
    check_a_row_in_any_batch_and_place((300, columns, 1000), dtype, "triton", counts, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype):
    from minirl_kernels.ops.matmul import triton as kernels

    ends = [0, 3, 3, 300, 301, 500]
    offs = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    a, b = matrix(510, 144, dtype=dtype, device=DEVICE), matrix(6, 144, 50, dtype=dtype, seed=1, device=DEVICE)
    by_rows = aten.grouped_product(kernels, a, b, offs)
    by_terms = aten.grouped_product(kernels, a.T, a, offs)
    for group, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        assert torch.equal(by_rows[begin:end], matmul(a[begin:end], b[group], backend="triton"))
        assert torch.equal(by_terms[group], matmul(a[begin:end].T, a[begin:end], backend="triton"))
    assert not by_rows[500:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stock_operation_depends_on_the_batch(dtype):
    """The data show that the vendor's operation has other bits in another batch.

    Where it has not, the test is skipped.
    """
    x, weight = cancelling(4096, 512, 2048, dtype, device=DEVICE)
    together = x @ weight.T
    if all(torch.equal(x[:count] @ weight.T, together[:count]) for count in (1, 2, 16, 17, 64, 255, 1024)):
        pytest.skip(f"torch {torch.__version__} gives the same bits in {dtype} for any of these batches on this GPU")
