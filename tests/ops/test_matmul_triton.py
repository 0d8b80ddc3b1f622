"""The Triton kernel of matmul, linear and bmm in Triton's interpreter: values and masks; hardware is not tested."""

import numpy as np
import pytest
import torch
import triton_cases
from dtypes import DTYPES
from matmul_cases import cancelling, check_a_row_in_any_batch_and_place, check_bmm, check_linear, check_matmul, matrix
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from verify import bounds
from verify.interpreter import recording
from verify.launches import captured, on_gpu

from minirl_kernels import linear, matmul
from minirl_kernels.ops.matmul import aten
from minirl_kernels.ops.matmul import triton as kernels

pytestmark = triton_cases.interpreter_only()


# (M, N, K): around the tiles (64, 128 rows; 64 columns) and their depth (16, 32)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 70, 33), (130, 3, 20)], ids=str)
def test_matmul(sizes, dtype):
    check_matmul(sizes, dtype, "triton")


def test_tiles_of_many_columns():
    check_matmul((3, kernels.WIDE + 8, 20), torch.bfloat16, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bmm(dtype):
    check_bmm((3, 17, 33, 20), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer", [(), (2, 9)], ids=str)
def test_linear(outer, dtype):
    check_linear(outer, (37, 50), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_any_batch_and_place(dtype):
    check_a_row_in_any_batch_and_place((140, 70, 100), dtype, "triton", [1, 2, 63, 65, 129])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype):
    """Each group is a separate product. Elements that belong to no group are 0."""
    offs = torch.tensor([0, 3, 3, 70, 71, 75], dtype=torch.int32)
    groups, begins = len(offs), [0, *offs.tolist()[:-1]]
    a, b = matrix(80, 40, dtype=dtype), matrix(groups, 40, 50, dtype=dtype, seed=1)
    by_rows = aten.grouped_product(kernels, a, b, offs)
    by_columns = aten.grouped_product(kernels, b.mT, a.T, offs)
    by_terms = aten.grouped_product(kernels, a.T, a, offs)
    for group, (begin, end) in enumerate(zip(begins, offs.tolist(), strict=True)):
        expected = matmul(a[begin:end], b[group], backend="triton")
        assert torch.equal(by_rows[begin:end], expected)
        assert torch.equal(by_columns[:, begin:end], expected.T)
        assert torch.equal(by_terms[group], matmul(a[begin:end].T, a[begin:end], backend="triton"))
    assert not by_rows[75:].any()
    assert not by_columns[:, 75:].any()


@pytest.mark.parametrize("ends", [[9, 4, 20], [-3, 5, 20], [5, 2**31 - 1, 20], [-5, -4, -3], [99, 99, 99]], ids=str)
def test_groups_that_end_nowhere_touch_nothing_else(ends):
    offs = torch.tensor(ends, dtype=torch.int32)
    a, b = matrix(20, 16), matrix(3, 16, 8, seed=1)
    with recording() as launches:
        aten.grouped_product(kernels, a, b, offs)
        aten.grouped_product(kernels, a.T, a, offs)
    assert [fault for launch in launches for fault in bounds.outside(launch)] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_torchs_names(dtype):
    """Addends of every shape, outputs of every layout, and vectors, through the code that the CPU's tests use."""
    a, b = matrix(9, 40, dtype=dtype), matrix(40, 20, dtype=dtype, seed=1)
    plain, wide = matmul(a, b, backend="triton"), a.float() @ b.float()
    for out in (
        torch.empty(9, 20, dtype=dtype),
        torch.empty(20, 9, dtype=dtype).T,
        torch.empty(9, 60, dtype=dtype)[:, ::3],
    ):
        assert torch.equal(aten.product(kernels, a, b, out=out), plain)
        for addend in (matrix(9, 20, dtype=dtype, turned=True), matrix(20, dtype=dtype), matrix(9, 1, dtype=dtype)):
            result = aten.added_product(kernels, addend, a, b, alpha=0.5, beta=3, out=out)
            torch.testing.assert_close(result, (0.5 * wide + 3 * addend.float()).to(dtype))
    assert torch.equal(aten.vector_product(kernels, a, b[:, 3]), plain[:, 3])
    assert torch.equal(aten.dot_product(kernels, a[2], b[:, 3]), plain[2, 3])


def test_nothing_to_sum_over_or_to_write():
    for m, n, k in ((0, 3, 4), (3, 0, 4), (3, 4, 0)):
        out = linear(torch.ones(m, k), torch.ones(n, k), torch.ones(n), backend="triton")
        assert torch.equal(out, torch.full((m, n), k + 1.0))


def test_rows_more_than_2_to_the_31_elements_apart():
    a, b = matrix(2, 24, dtype=torch.bfloat16), matrix(24, 16, dtype=torch.bfloat16, seed=1)
    near = matmul(a, b, backend="triton")

    def far(x):
        stride = 2**31 + 48
        memory = torch.empty((len(x) - 1) * stride + x.shape[1], dtype=x.dtype)
        return memory.as_strided(x.shape, (stride, 1)).copy_(x)

    out = far(near[:2] * 0)
    assert torch.equal(aten.product(kernels, far(a), b, out=out), near)
    assert torch.equal(matmul(a[:, :2], far(b[:2]), backend="triton"), matmul(a[:, :2], b[:2], backend="triton"))
    assert torch.equal(linear(a, far(b.T[:2]), backend="triton"), near[:, :2])


def test_more_tokens_than_a_grid_axis_but_the_first_can_count():
    rows = 5_000_000
    x = torch.zeros(1, 16).expand(rows, 16)
    with captured() as launches:
        linear(x, torch.zeros(70, 16), backend="triton")
        aten.product(kernels, x[:70_000, None], torch.zeros(70_000, 16, 1))
    assert [launch.grid for launch in launches] == [(2 * rows // 32,), (70_000,)]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_100", "gfx942"])
def test_a_large_batch_and_a_small_one_run_the_same_binary(gpu):
    """Tensor cores could add up in another order in another tile. These GPUs were not measured."""

    def constants_of(rows):
        x, weight = cancelling(rows, 48, 64, torch.bfloat16)
        with on_gpu(gpu), captured() as launches:
            linear(x, weight, backend="triton")
            linear(x, weight.T.contiguous().T, weight[:, 0].contiguous(), backend="triton")
        return [launch.kwargs for launch in launches]

    assert constants_of(1) == constants_of(1000)


def test_the_rows_choose_a_tile_on_a_gpu_that_was_measured():
    """Few rows have a low tile, and many rows a large one, unless it would leave most multiprocessors without work."""

    def tile(rows, padding=0):
        x = torch.empty(rows, 72 + padding, dtype=torch.bfloat16)[:, :72]
        with on_gpu("sm_90"), captured() as launches:
            linear(x, torch.empty(4096, 72, dtype=torch.bfloat16), backend="triton")
        return launches[0].kwargs["BLOCK_M"], launches[0].kwargs["BLOCK_N"]

    assert [tile(rows) for rows in (1, 16)] == [(16, 32)] * 2
    assert [tile(rows) for rows in (17, 128, 129)] == [(64, 64)] * 3
    assert [tile(rows) for rows in (512, 1024, 8192)] == [(128, 128), (256, 128), (256, 128)]
    assert tile(8192, padding=1) == (64, 64)  # each element takes an address, and a large tile has no registers for it


def by_chains_of_multiply_adds(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The product of the interpreter, in the order of a GPU: a chain of fused multiply-adds for each output."""
    left, right = a.data.astype(np.float64), b.data.astype(np.float64)
    total = d.data
    for i in range(left.shape[1]):
        total = (left[:, i : i + 1] * right[i] + total).astype(np.float32)
    return TensorHandle(total, d.dtype.scalar)


@pytest.mark.parametrize(("depth", "layout"), [(1024, "plain"), (8192, "plain"), (8200, "terms")])
def test_long_sums_in_float32_are_as_exact_as_the_vendors(depth, layout, monkeypatch):
    """cuBLAS on an H200 is off by 2.0e-7 of the largest value for 1,024 terms, and by 3.0e-7 for 8,200."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", by_chains_of_multiply_adds)
    a, b = matrix(32, depth), matrix(depth, 64, seed=1)
    if layout == "plain":
        out = matmul(a, b, backend="triton")
    else:
        out = aten.grouped_product(kernels, a, b, torch.tensor([depth], dtype=torch.int32))[0]
    exact = a.double() @ b.double()
    error = ((out - exact).abs().max() / exact.abs().max()).item()
    assert error < 1.5 * (3.0e-7 if depth > 1024 else 2.0e-7)
