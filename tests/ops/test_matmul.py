"""matmul, linear and bmm: values, gradients, torch's own names, and bits that depend on K and the dtype only."""

import pytest
import torch
from dtypes import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from matmul_cases import cancelling, check_a_row_in_any_batch_and_place, check_bmm, check_linear, check_matmul, matrix
from policy_batches import assert_as_exact_as_eager, tables_of_one_order
from torch.nn import functional as F

from minirl_kernels import bmm, linear, matmul
from minirl_kernels.backends import native
from minirl_kernels.ops.matmul import aten
from minirl_kernels.ops.matmul import cpu as kernels

# (M, N, K): around the panels (6 and 14 rows; 8, 16, 32 columns), the unpacked rows (4), the chunks (256, 512)
SIZES = [(1, 1, 1), (1, 33, 513), (2, 7, 300), (3, 16, 31), (4, 70, 64), (5, 32, 17), (29, 70, 513), (3, 600, 1025)]
# numbers of rows in a batch
COUNTS = [*range(1, 20), *range(20, 250, 23), 255, 256, 257]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matmul(sizes, dtype, backend):
    check_matmul(sizes, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 2, 3, 4), (5, 17, 33, 70), (40, 1, 24, 16)], ids=str)
def test_bmm(sizes, dtype, backend):
    check_bmm(sizes, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outer", [(), (7,), (2, 9), (2, 3, 4)], ids=str)
def test_linear(outer, dtype, backend):
    check_linear(outer, (37, 130), dtype, backend)


@pytest.mark.parametrize("op", [lambda a, b: a @ b, F.linear], ids=["mm", "linear"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stock_operation_depends_on_the_batch(dtype, op):
    """The data show that torch's operation has other bits in another batch. Where it has not, the test is skipped."""
    x, weight = cancelling(300, 64, 1600, dtype)
    weight = weight.T.contiguous() if op is not F.linear else weight
    together = op(x, weight)
    if all(torch.equal(op(x[:count], weight), together[:count]) for count in COUNTS):
        pytest.skip(f"torch {torch.__version__} gives the same bits in {dtype} for 1 to 257 rows on this machine")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_data_would_show_another_order(dtype, cpu):
    x, weight = cancelling(50, 40, 1100, dtype)
    order = torch.randperm(1100, generator=torch.Generator().manual_seed(5))
    assert (matmul(x, weight.T) != matmul(x[:, order], weight[:, order].T)).float().mean() > 0.9


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_any_batch_and_place(dtype, count, cpu, threads):
    threads(count)
    check_a_row_in_any_batch_and_place((300, 50, 600), dtype, cpu, COUNTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(dtype, cpu, threads):
    """The work on these shapes is split by rows, by columns, or not at all."""
    for m, n in ((1, 1200), (3, 2000), (1500, 40), (130, 600)):
        x, weight = cancelling(m, n, 700, dtype)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(linear(x, weight))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_with_a_fused_multiply_add(dtype, set_isa):
    """Packed and unpacked rows, with weights that are contiguous along rows or columns."""
    x, weight = cancelling(20, 90, 1102, dtype)
    results = []
    for isa in tables_of_one_order(dtype):
        set_isa(isa)
        results.append([matmul(x[:count], b) for b in (weight.T, weight.T.contiguous()) for count in (1, 2, 3, 4, 20)])
    for result in results:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_on_every_instruction_set(dtype, isa, set_isa):
    """Few rows are multiplied by other code, which must give the same bits."""
    if isa not in native().isa_supported():
        pytest.skip(f"this processor does not run {isa}")
    set_isa(isa)
    for depth in (1102, 70, 1):
        x, weight = cancelling(20, 90, 2 * depth, dtype)
        for columns in (90, 16, 7):
            together = matmul(x, weight[:columns].T)
            for count in range(1, 7):
                for b in (weight[:columns].T, weight[:columns].T.contiguous()):
                    assert torch.equal(matmul(x[count : 2 * count], b), together[count : 2 * count])


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 80), st.integers(1, 80), st.integers(1, 700)),
    dtype=st.sampled_from(DTYPES),
    turned=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
@pytest.mark.usefixtures("cpu")
def test_any_block_of_any_product(sizes, dtype, turned, data):
    """Any block of rows and columns has the same bits alone as in the whole product, in any memory layout."""
    rows, columns, depth = sizes
    x, weight = cancelling(rows, columns, 2 * depth, dtype)
    whole = matmul(x, weight.T)
    exact = x.double() @ weight.double().T
    # the error of K terms, summed in float32 in chains of at most 512 and rounded once; the exact sum is nearly 0
    bound = 2.0**-24 * 40 * (x.double().abs() @ weight.double().abs().T)
    assert bool(((whole.double() - exact).abs() <= bound * (1 + torch.finfo(dtype).eps)).all())
    first_row, first_column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    last_row, last_column = (
        data.draw(st.integers(first_row, rows - 1)),
        data.draw(st.integers(first_column, columns - 1)),
    )
    block = slice(first_row, last_row + 1), slice(first_column, last_column + 1)
    a, b = x[block[0]], weight[block[1]].T
    a = a.T.contiguous().T if turned[0] else a
    b = b.contiguous() if turned[1] else b
    assert torch.equal(matmul(a, b), whole[block])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, cpu):
    """The bits do not depend on strides: steps in both dimensions, broadcast operands, rows of a longer sequence."""
    a, b = matrix(9, 40, dtype=dtype), matrix(40, 13, dtype=dtype, seed=1)
    wide_a, wide_b = a.new_zeros(18, 120), b.new_zeros(80, 26)
    wide_a[::2, ::3], wide_b[::2, ::2] = a, b
    plain = matmul(a, b, backend=cpu)
    assert torch.equal(matmul(wide_a[::2, ::3], wide_b[::2, ::2], backend=cpu), plain)
    assert torch.equal(matmul(a[:1].expand(5, -1), b, backend=cpu), plain[:1].expand(5, -1))
    column = a[:, :1].contiguous()
    assert torch.equal(matmul(column.expand(-1, 40), b, backend=cpu), matmul(column.repeat(1, 40), b, backend=cpu))
    shared = bmm(a.expand(3, -1, -1), b.expand(3, -1, -1), backend=cpu)
    assert all(torch.equal(product, plain) for product in shared)
    x = matrix(3, 8, 40, dtype=dtype)
    for part in (x[:, 2:5], x[:, -1:], x.transpose(0, 1), x[..., ::2]):
        weight = b.T if part.shape[-1] == 40 else b.T[:, :20]
        assert torch.equal(linear(part, weight, backend=cpu), linear(part.contiguous(), weight, backend=cpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_sum_over_or_to_write(dtype, backend):
    def empty(*shape):
        return torch.ones(shape, dtype=dtype, requires_grad=True)

    for (m, n, k), batch in (((0, 3, 4), 2), ((3, 0, 4), 2), ((3, 4, 0), 2), ((3, 4, 5), 0)):
        x, weight, bias = empty(m, k), empty(n, k), empty(n)
        out = linear(x, weight, bias, backend=backend)
        out.sum().backward()
        assert torch.equal(out, torch.full((m, n), k + 1.0, dtype=dtype))
        assert torch.equal(bias.grad, torch.full((n,), float(m), dtype=dtype))
        assert torch.equal(weight.grad, torch.full((n, k), float(m), dtype=dtype))
        assert torch.equal(x.grad, torch.full((m, k), float(n), dtype=dtype))
        assert torch.equal(matmul(x, weight.T, backend=backend), torch.full((m, n), float(k), dtype=dtype))
        products = bmm(empty(batch, m, k), empty(batch, k, n), backend=backend)
        assert torch.equal(products, torch.full((batch, m, n), float(k), dtype=dtype))


def test_what_is_no_number_stays_in_its_row(backend):
    a, b = matrix(40, 30), matrix(30, 20, seed=1)
    plain = matmul(a, b, backend=backend)
    a[17, 3] = float("nan")
    out = matmul(a, b, backend=backend)
    assert out[17].isnan().all()
    rest = torch.arange(40) != 17
    assert torch.equal(out[rest], plain[rest])


def test_rows_more_than_2_to_the_31_elements_apart(cpu):
    a, b = matrix(2, 24, dtype=torch.bfloat16), matrix(24, 16, dtype=torch.bfloat16, seed=1)
    near = matmul(a, b)

    def far(x):
        stride = 2**31 + 48
        memory = torch.empty((len(x) - 1) * stride + x.shape[1], dtype=x.dtype)
        return memory.as_strided(x.shape, (stride, 1)).copy_(x)

    assert torch.equal(matmul(far(a), b), near)
    assert torch.equal(matmul(a[:, :2], far(b[:2])), matmul(a[:, :2], b[:2]))
    assert torch.equal(linear(a, far(b.T[:2])), near[:, :2])


def test_autocast(backend):
    x, weight, bias = matrix(5, 40), matrix(13, 40, seed=1), matrix(13, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = (
            linear(x, weight, bias, backend=backend),
            matmul(x, weight.T.half(), backend=backend),
            bmm(x[None], weight.T[None], backend=backend),
        )
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    assert torch.equal(results[0], linear(x, weight, bias, backend=backend))
    assert all(result.dtype == torch.bfloat16 for result in results)
    assert torch.equal(results[2][0], matmul(x, weight.T, backend=backend))


ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: matmul([1.0], ONES), TypeError, "a is a list: it must be a tensor"),
        (
            lambda: matmul(ONES, ONES.double()),
            TypeError,
            "b has dtype torch.float64: it must be the dtype of a, torch.float32",
        ),
        (
            lambda: matmul(ONES.long(), ONES),
            TypeError,
            "a has dtype torch.int64: it must be float32, bfloat16 or float16",
        ),
        (lambda: matmul(ONES[0], ONES), ValueError, r"a has shape \(4,\): it must be \[M, K\]"),
        (lambda: matmul(ONES, ONES), ValueError, r"b has shape \(3, 4\): it must be \[4, N\] for this a"),
        (lambda: bmm(ONES, ONES), ValueError, r"a has shape \(3, 4\): it must be \[B, M, K\]"),
        (lambda: bmm(ONES[None], ONES.expand(2, 3, 4)), ValueError, r"b has shape .*: it must be \[1, 4, N\]"),
        (lambda: matmul(ONES, ONES.T.to("meta")), ValueError, "b is on meta: it must be on cpu"),
        (lambda: linear(ONES, None), TypeError, "weight is a NoneType: it must be a tensor"),
        (lambda: linear(torch.ones(()), ONES), ValueError, r"x has shape \(\): it must be \[..., K\]"),
        (lambda: linear(ONES, ONES.T), ValueError, r"weight has shape \(4, 3\): it must be \[N, 4\], K of x"),
        (lambda: linear(ONES, ONES, ONES[0]), ValueError, r"bias has shape \(4,\): it must be \(3,\), N of weight"),
        (
            lambda: linear(ONES, ONES, ONES[0].half()),
            TypeError,
            "bias has dtype torch.float16: it must be the dtype of x",
        ),
        (lambda: matmul(ONES, ONES.T, backend="cuda"), ValueError, "backend is 'cuda'; matmul must be given one of"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# by torch's own names


def outputs(shape, dtype):
    """None, and memory for the output in every layout."""
    wide = torch.full((*shape[:-2], 2 * shape[-2], 3 * shape[-1]), float("nan"), dtype=dtype)
    yield None
    yield torch.full(shape, float("nan"), dtype=dtype)
    yield torch.full((*shape[:-2], shape[-1], shape[-2]), float("nan"), dtype=dtype).mT
    yield wide[..., : shape[-2], : shape[-1]]
    yield wide[..., ::2, ::3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrices", "batches"])
@pytest.mark.parametrize("sizes", [(5, 33, 70), (2, 1, 40), (1, 20, 600)], ids=str)
def test_mm_and_addmm(sizes, batch, dtype, cpu):
    m, n, k = sizes
    a, b = matrix(*batch, m, k, dtype=dtype), matrix(*batch, k, n, dtype=dtype, seed=1)
    addends = [matrix(*shape, dtype=dtype, seed=2) for shape in ((*batch, m, n), (n,), (m, 1), (1, 1), ())]
    addends.append(matrix(*batch, m, n, dtype=dtype, turned=True))
    exact, plain = a.double() @ b.double(), (bmm if batch else matmul)(a, b)
    for out in outputs((*batch, m, n), dtype):
        result = aten.product(kernels, a, b, out=out)
        assert out is None or result is out
        assert torch.equal(result, plain)
        for addend in addends:
            for alpha, beta in ((1, 1), (0.5, -2), (3, 0)):
                result = aten.added_product(kernels, addend, a, b, alpha=alpha, beta=beta, out=out)
                wide = alpha * (a.float() @ b.float()) + beta * addend.float()
                assert out is None or result is out
                assert_as_exact_as_eager(result, wide.to(dtype), alpha * exact + beta * addend.double())


def test_an_addend_that_counts_for_nothing_may_be_no_number(cpu):
    a, b, nan = matrix(3, 4), matrix(4, 5), torch.full((3, 5), float("nan"))
    assert torch.equal(aten.added_product(kernels, nan, a, b, beta=0), matmul(a, b))
    assert torch.equal(aten.added_vector_product(kernels, nan[:, 0], a, b[:, 0], beta=0), matmul(a, b[:, :1])[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_addend_may_be_the_output(dtype, cpu):
    a, b, addend = matrix(9, 600, dtype=dtype), matrix(600, 40, dtype=dtype), matrix(9, 40, dtype=dtype)
    expected = aten.added_product(kernels, addend.clone(), a, b)
    for turned in (False, True):
        out = addend.T.contiguous().T if turned else addend.clone()
        assert torch.equal(aten.added_product(kernels, out, a, b, out=out), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors(dtype, cpu):
    """mv, addmv and dot have the bits of a matrix of one column."""
    a, x, addend = matrix(37, 600, dtype=dtype), matrix(600, dtype=dtype, seed=1), matrix(37, dtype=dtype, seed=2)
    plain, steps = matmul(a, x[:, None])[:, 0], torch.zeros(1200, dtype=dtype)
    steps[::2] = x
    for vector in (x, steps[::2]):
        for turned in (a, a.T.contiguous().T):
            for out in (None, torch.empty(37, dtype=dtype), torch.empty(74, dtype=dtype)[::2]):
                assert torch.equal(aten.vector_product(kernels, turned, vector, out=out), plain)
                result = aten.added_vector_product(kernels, addend, turned, vector, alpha=0.5, beta=2, out=out)
                exact = 0.5 * a.double() @ x.double() + 2 * addend.double()
                assert_as_exact_as_eager(result, (0.5 * a.float() @ x.float() + 2 * addend.float()).to(dtype), exact)
        out = torch.empty((), dtype=dtype)
        assert aten.dot_product(kernels, a[3], vector, out=out) is out
        assert torch.equal(out, plain[3])
        assert torch.equal(aten.dot_product(kernels, vector, a[3]), plain[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups(dtype, cpu, threads):
    """Each group has the bits of a separate product. Elements that belong to no group are 0."""
    offs = torch.tensor([0, 3, 3, 40, 41, 100], dtype=torch.int32)
    groups, begins = len(offs), [0, *offs.tolist()[:-1]]
    rows, depth, columns = 110, 530, 50
    a, b = matrix(rows, depth, dtype=dtype), matrix(groups, depth, columns, dtype=dtype, seed=1)
    for count in (1, 2):
        threads(count)
        by_rows = aten.grouped_product(kernels, a, b, offs)
        by_columns = aten.grouped_product(kernels, b.mT, a.T, offs)
        by_terms = aten.grouped_product(kernels, a.T, a, offs)
        assert by_terms.shape == (groups, depth, depth)
        for group, (begin, end) in enumerate(zip(begins, offs.tolist(), strict=True)):
            expected = matmul(a[begin:end], b[group])
            assert torch.equal(by_rows[begin:end], expected)
            assert torch.equal(by_columns[:, begin:end], expected.T)
            assert torch.equal(by_terms[group], matmul(a[begin:end].T, a[begin:end]))
        assert not by_rows[100:].any()
        assert not by_columns[:, 100:].any()
    batch = aten.grouped_product(kernels, b.mT, b)
    assert torch.equal(batch, bmm(b.mT, b))


def test_groups_as_torch_has_them(cpu):
    a, b = matrix(32, 64, dtype=torch.bfloat16), matrix(3, 64, 32, dtype=torch.bfloat16, seed=1)
    offs = torch.tensor([8, 8, 32], dtype=torch.int32)
    for x, y in ((a, b), (b.mT, a.T.contiguous()), (a.T.contiguous(), a)):
        ours, theirs = aten.grouped_product(kernels, x, y, offs), torch._grouped_mm(x, y, offs)
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def offsets(*ends):
    return torch.tensor(ends, dtype=torch.int32)


BATCH = torch.ones(2, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: aten.product(kernels, ONES, ONES), ValueError, r"mat2 has shape \(3, 4\): it must be \[4, N\]"),
        (
            lambda: aten.product(kernels, ONES, ONES.T.half()),
            TypeError,
            "mat2 has dtype torch.float16: it must be the dtype of self",
        ),
        (
            lambda: aten.product(kernels, ONES, BATCH),
            ValueError,
            "mat2 has shape .*: it must have the outer dimensions",
        ),
        (lambda: aten.product(kernels, ONES, ONES.T, out=ONES), ValueError, r"out has shape \(3, 4\) .* be \(3, 3\)"),
        (lambda: aten.added_product(kernels, ONES.half(), ONES, ONES.T), TypeError, "self has dtype torch.float16"),
        (lambda: aten.vector_product(kernels, ONES, ONES), ValueError, r"they must be \[M, K\] and \[K\]"),
        (lambda: aten.dot_product(kernels, ONES[0], ONES[:, 0]), ValueError, r"tensor has shape \(3,\)"),
        (lambda: aten.grouped_product(kernels, ONES, BATCH), ValueError, "offs must be the end of each group"),
        (
            lambda: aten.grouped_product(kernels, ONES, BATCH, offsets(3)),
            ValueError,
            "offs has 1 groups: it must have 2",
        ),
        (lambda: aten.grouped_product(kernels, ONES, BATCH, offsets(2, 1)), ValueError, "offs has 1 for group 1"),
        (
            lambda: aten.grouped_product(kernels, ONES, BATCH, offsets(2, 4)),
            ValueError,
            "at most 3, the number of rows",
        ),
        (lambda: aten.grouped_product(kernels, ONES, BATCH, offsets(2, 3), ONES[0]), ValueError, "bias is a tensor"),
        (
            lambda: aten.grouped_product(kernels, ONES, BATCH, offsets(2, 3), None, torch.float16),
            ValueError,
            "out_dtype is torch.float16: it must be the dtype of the operands",
        ),
        (lambda: aten.grouped_product(kernels, ONES[0], BATCH), ValueError, "they must have two or three each"),
    ],
)
def test_errors_by_torchs_names(call, error, message, cpu):
    with pytest.raises(error, match=message):
        call()
