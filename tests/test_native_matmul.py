"""The shared matmul is accurate in every dtype and layout, and its bits depend on K and the dtype only."""

import itertools

import pytest
import torch
from dtypes import DTYPES
from policy_batches import tables_of_one_order

from minirl_kernels import backends
from minirl_kernels.common.native_matmul import matmul_into

pytestmark = pytest.mark.usefixtures("cpu")
# around the panels (6 and 14 rows; 8, 16, 32 columns), the blocks (512 columns, 1008 rows), the chunks (256, 512)
SHAPES = [
    (1, 1, 1), (1, 5, 3), (2, 7, 1023), (3, 16, 31), (15, 33, 17), (14, 32, 512), (29, 70, 513), (40, 530, 1025),
    (1010, 3, 2), (5, 1, 300),
]  # fmt: skip


def matrix(rows, columns, dtype, turned, seed=0):
    """[rows, columns], contiguous along the rows or, if turned, along the columns."""
    gen = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if turned else (rows, columns)
    x = torch.randn(shape, generator=gen).to(dtype)
    return x.T if turned else x


def product(a, b):
    return matmul_into(torch.full((a.shape[0], b.shape[1]), float("nan")), a, b)


def cancelling(rows, depth, columns, dtype):
    """The exact product [x, x] [w, -w]^T is 0, so nearly every element shows any other order of its sum."""
    half = depth // 2
    x, w = matrix(rows, half, dtype, False), matrix(half, columns, dtype, False, seed=1)
    return torch.cat([x, x], 1), torch.cat([w, -w], 0)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, isa, set_isa):
    if isa not in backends.native().isa_supported():
        pytest.skip(f"this processor does not run {isa}")
    set_isa(isa)
    for (m, n, k), a_turned, b_turned in itertools.product(SHAPES, (False, True), (False, True)):
        a, b = matrix(m, k, dtype, a_turned), matrix(k, n, dtype, b_turned, seed=1)
        exact = a.double() @ b.double()
        # the error of K terms, summed in float32 in chains of at most 512
        bound = 2.0**-24 * 40 * (a.double().abs() @ b.double().abs())
        out = product(a, b)
        assert bool(((out - exact).abs() <= bound).all()), (m, n, k, a_turned, b_turned)
        twice = matmul_into(out.clone(), a, b, accumulate=True)
        assert bool(((twice - 2 * exact).abs() <= 3 * bound).all()), (m, n, k, a_turned, b_turned)


@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("depth", [256, 1100, 4096])
def test_long_sums_of_float32_lose_little(depth, rows):
    """A chain of 256 products loses 2.8e-7 of the norm.

    The bound is lower, as for MKL and for gradients that cancel.
    """
    a, b = matrix(rows, depth, torch.float32, False), matrix(depth, 300, torch.float32, False, seed=1)
    exact = a.double() @ b.double()
    assert (product(a, b) - exact).norm() < 2e-7 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_rows_place_layout_or_threads(dtype, threads):
    a, b = cancelling(61, 1300, 1100, dtype)
    threads(1)
    whole = product(a, b)
    assert whole.count_nonzero() > whole.numel() // 2
    for count in (2, 3):
        threads(count)
        assert torch.equal(product(a, b), whole)
    for rows in (slice(0, 1), slice(7, 10), slice(3, 60), slice(60, 61)):
        assert torch.equal(product(a[rows], b), whole[rows])
    assert torch.equal(product(a, b[:, 513:515]), whole[:, 513:515])
    assert torch.equal(product(a.T.contiguous().T, b.T.contiguous().T), whole)
    wide = torch.full((61, 1200), 7.0)
    assert torch.equal(matmul_into(wide[:, 50:1150], a, b), whole)
    assert torch.equal(wide[:, :50], torch.full((61, 50), 7.0))
    assert torch.equal(wide[:, 1150:], torch.full((61, 50), 7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_equal_on_tables_with_a_fused_multiply_add(dtype, set_isa):
    a, b = cancelling(37, 1026, 70, dtype)
    results = []
    for isa in tables_of_one_order(dtype):
        set_isa(isa)
        results.append(product(a, b))
    assert all(torch.equal(result, results[0]) for result in results)


def chain(sums, a, b, terms):
    """Add products to `sums` as fused multiply-adds do.

    The product of two bfloat16 numbers is exact in float32, so only the sum is rounded.
    """
    for k in terms:
        sums = sums + a[:, k, None] * b[k]
    return sums


def order_of_pairs(a, b):
    total = torch.zeros(a.shape[0], b.shape[1])
    for chunk in range(0, a.shape[1], 512):
        terms = [k ^ 1 for k in range(chunk, min(chunk + 512, a.shape[1]))]
        total = total + chain(torch.zeros_like(total), a, b, terms)
    return total


def order_of_tiles(a, b):
    total = torch.zeros(a.shape[0], b.shape[1])
    for tile in range(0, a.shape[1], 32):
        firsts, seconds = range(tile, min(tile + 32, a.shape[1]), 2), range(tile + 1, min(tile + 32, a.shape[1]), 2)
        zeros = torch.zeros_like(total)
        total = total + (chain(zeros, a, b, firsts) + chain(zeros, a, b, seconds))
    return total


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_the_order_of_bfloat16_sums_is_what_the_header_says(isa, set_isa):
    if isa not in backends.native().isa_supported():
        pytest.skip(f"this processor does not run {isa}")
    set_isa(isa)
    a, b = cancelling(37, 1028, 50, torch.bfloat16)
    expected = (order_of_tiles if isa == "amx" else order_of_pairs)(a.float(), b.float())
    assert torch.equal(product(a, b), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_empty(shape):
    m, n, k = shape
    assert torch.equal(product(torch.ones(m, k), torch.ones(k, n)), torch.zeros(m, n))
    assert torch.equal(matmul_into(torch.ones(m, n), torch.ones(m, k), torch.ones(k, n), accumulate=True),
                       torch.ones(m, n) + k * (m * n > 0))  # fmt: skip
