"""mean and sum against float64; the bits of a result depend on its elements and their dtype only."""

import math

import hypothesis.strategies as st
import pytest
import torch
from dtypes import DTYPES
from hypothesis import HealthCheck, given, settings
from policy_batches import assert_as_exact_as_eager
from row_bits import cancelling, check_batches, check_layouts, check_tables, check_threads, strided

import minirl_kernels as mk
from minirl_kernels import mean
from minirl_kernels.backends import native
from minirl_kernels.ops.mean.layout import layout_of

BLOCK = 4096  # of the sum; the sizes are around it, around the vectors and around the strips of columns
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 70]
CALLS = {"mean": (mean, torch.mean), "sum": (mk.sum, torch.sum)}
META = torch.device("meta")


@pytest.fixture(params=CALLS)
def calls(request):
    """(the library's function, torch's function)"""
    return CALLS[request.param]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward_backward(call, x, dim, keepdim=False, **options):
    leaf = x.detach().requires_grad_()
    out = call(leaf, dim, keepdim, **options)
    upstream = (torch.arange(out.numel()) % 5 - 1.5).reshape(out.shape).to(out.dtype)
    (grad,) = torch.autograd.grad(out, leaf, upstream)
    return out.detach(), grad


def check(calls, x, dim, backend, keepdim=False, with_gradient=True, **options):
    ours, theirs = calls
    found = forward_backward(ours, x, dim, keepdim, backend=backend, **options)
    eager = forward_backward(theirs, x, dim, keepdim, **options)
    exact = forward_backward(theirs, x.double(), dim, keepdim)
    # the rounding errors of a sum are relative to its terms
    terms = x.double().abs().sum(dim, keepdim) / (1 if theirs is torch.sum else x.numel() / max(exact[0].numel(), 1))
    assert_as_exact_as_eager(found[0], eager[0], exact[0], terms)
    if with_gradient:
        assert_as_exact_as_eager(found[1], eager[1], exact[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows_and_columns(size, dtype, calls, backend):
    check(calls, random(5, size, dtype=dtype), -1, backend)
    check(calls, random(size, 5, dtype=dtype), 0, backend)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -2, -1, (0,), (0, 1), (1, 2), (-1, 0), (0, 2), (1, 3), (3, 0, 2, 1), None])
def test_dimensions(dim, keepdim, calls, backend):
    check(calls, random(3, 4, 5, 70), dim, backend, keepdim)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, 1:],
        lambda x: x[..., 3:17],
        lambda x: x[..., ::2],
        lambda x: x.transpose(0, 1),
        lambda x: x.mT,
        lambda x: x.permute(2, 0, 1),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[..., :1].expand(-1, -1, 6),
        lambda x: x[0, 0],
        lambda x: x[0, 0, 0],
    ],
    ids=["slice", "row", "step", "transposed", "swapped", "permuted", "expanded", "spread", "vector", "number"],
)
def test_strides(view, calls, cpu):
    """A view gives the bits of its copy, along any dimensions."""
    x = view(cancelling(20, 33).view(4, 5, 33))
    copy = x.clone(memory_format=torch.contiguous_format)
    dims = [None, *range(x.dim()), *((a, b) for a in range(x.dim()) for b in range(a))]
    for dim in dims:
        assert torch.equal(calls[0](x, dim, backend=cpu), calls[0](copy, dim, backend=cpu))


@pytest.mark.parametrize(
    ("view", "dims"),
    [
        (lambda x: x[:, :60], [0, 1]),
        (lambda x: x.T, [0, 1]),
        (lambda x: x[:, :60].T, [0, 1]),
        (lambda x: x.view(5, 10, 64)[..., 3:].transpose(0, 1), [2]),
        (lambda x: x.view(5, 10, 64)[..., :60], [1, 2]),
    ],
    ids=["columns", "transposed", "both", "rows of two strides", "matrices"],
)
def test_no_copy_is_made_of_strided_memory(view, dims):
    x = view(random(50, 64))
    for dim in dims:
        assert layout_of(x, (dim,), transposes=True).x.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_column_has_the_bits_of_a_row(size, dtype, cpu):
    """The data show the order of summation: torch's sums of rows and of columns differ."""
    x = cancelling(70, size, dtype)
    by_row = mk.sum(x, -1, backend=cpu, dtype=torch.float32)
    columns = x.T.contiguous()
    assert torch.equal(by_row, mk.sum(columns, 0, backend=cpu, dtype=torch.float32))
    assert torch.equal(mean(x, -1, backend=cpu), mean(columns, 0, backend=cpu))
    middle = x.view(7, 10, size).mT.contiguous()
    assert torch.equal(by_row.view(7, 10), mk.sum(middle, 1, backend=cpu, dtype=torch.float32))
    if size >= 1000:
        wide = x.float()
        assert (wide.sum(-1) != wide.T.contiguous().sum(0)).float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [130, 5003])
def test_a_row_in_any_batch(size, dtype, cpu):
    """torch's mean keeps its bits here too, except for a single long row (see the tests of threads)."""

    def call(x):
        return mean(x, -1, backend=cpu), mk.sum(x, -1, dtype=torch.float32, backend=cpu)

    x = cancelling(257, size, dtype)
    check_batches(call, x)
    check_layouts(call, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_in_any_batch(dtype, cpu):
    """The gradient of a bias has the same bits for any number of outputs."""
    x = cancelling(257, 1027, dtype)

    def call(rows):
        return (mk.sum(rows.T.contiguous(), 0, dtype=torch.float32, backend=cpu),)

    check_batches(call, x)
    check_layouts(call, x)


@pytest.mark.parametrize("shape", [(1, 151_936), (3, 151_936), (40, 1000), (1, 1_000_003)], ids=str)
def test_threads(shape, cpu, threads):
    x = cancelling(*shape)

    def call(x):
        return (
            mk.sum(x, -1, backend=cpu),
            mean(x, None, backend=cpu),
            mk.sum(x.view(-1, 32 * 47)[:, :9], 0, backend=cpu),
        )

    whole = x if x.numel() % (32 * 47) == 0 else x.flatten()[: x.numel() // (32 * 47) * 32 * 47].view(1, -1)
    check_threads(call, whole, threads=threads)


def test_the_data_would_show_other_threads(threads):
    """torch's sum of one long row differs between one thread and two."""
    x = cancelling(1, 151_936)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(torch.stack([x.roll(shift, 1).sum() for shift in range(20)]))
    assert (results[0] != results[1]).float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set(size, dtype, cpu, set_isa):
    def call(x):
        return mk.sum(x, -1, backend=cpu), mean(x, 0, backend=cpu), mk.sum(x, None, dtype=torch.float32, backend=cpu)

    check_tables(call, cancelling(70, size, dtype), set_isa=set_isa)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, cpu, threads, set_isa):
    """The baseline's sum of a row on one thread is found in a batch, as a column, on other tables and threads."""
    rows, size = data.draw(st.integers(1, 90)), data.draw(st.one_of(st.integers(1, 300), st.integers(1, 10_000)))
    dtype, row = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, rows - 1))
    x = cancelling(rows, size, dtype, seed=data.draw(st.integers(0, 2**31)))
    set_isa("baseline")
    threads(1)
    expected = mk.sum(x[row], -1, backend=cpu, dtype=torch.float32)
    set_isa(data.draw(st.sampled_from(native().isa_supported())))
    threads(data.draw(st.integers(1, 3)))
    padding = data.draw(st.integers(0, 20))
    for found in (
        mk.sum(strided(x, padding), -1, backend=cpu, dtype=torch.float32),
        mk.sum(strided(x.T.contiguous(), padding), 0, backend=cpu, dtype=torch.float32),
    ):
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), 0), ((5, 0), -1), ((0,), None), ((3, 0, 2), (1, 2))], ids=str)
def test_of_nothing(shape, dim, backend):
    x = torch.zeros(shape)
    assert torch.equal(mk.sum(x, dim, backend=backend), x.sum(dim))
    assert torch.equal(mean(x, dim, backend=backend).isnan(), x.mean(dim).isnan())


@pytest.mark.parametrize(("shape", "dim"), [((0, 5), -1), ((5, 0), 0), ((2, 0, 3), 0)], ids=str)
def test_no_rows(shape, dim, calls, backend):
    found = forward_backward(calls[0], torch.zeros(shape), dim, backend=backend)
    expected = forward_backward(calls[1], torch.zeros(shape), dim)
    assert [x.shape for x in found] == [x.shape for x in expected]


@pytest.mark.parametrize("of", DTYPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_dtype(of, to, calls, backend):
    """A sum of 16-bit values with a float32 result is not rounded to 16 bits."""
    widens = to in (of, torch.float32)  # otherwise the gradient is rounded to both dtypes, in either order
    check(calls, random(4, 3000, dtype=of), -1, backend, with_gradient=widens, dtype=to)
    check(calls, random(3000, 4, dtype=of), 0, backend, with_gradient=widens, dtype=to)


def test_what_is_no_number_stays_in_its_row(calls, backend):
    x = random(4, 100)
    x[1, 50], x[2, 99], x[3, 0] = math.nan, math.inf, -math.inf
    assert torch.equal(calls[0](x, -1, backend=backend).isfinite(), torch.tensor([True, False, False, False]))


def test_a_large_sum_of_halves_does_not_overflow_on_its_way(backend):
    x = torch.full((100, 3), 60000.0, dtype=torch.float16)
    assert torch.equal(mean(x, 0, backend=backend), x[0])


def test_rows_2_to_the_30_apart(tmp_path, backend):
    """Rows lie 2^30 elements apart in a sparse file of 6 GiB."""
    stride, rows = 2**30, random(3, 1025, dtype=torch.bfloat16)
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 1025, dtype=torch.bfloat16)
    x = file.as_strided((3, 1025), (stride, 1))
    x.copy_(rows)
    for dim in (0, 1):
        assert torch.equal(mk.sum(x, dim, backend=backend), mk.sum(rows, dim, backend=backend))


def test_under_autocast(calls, backend):
    x = random(4, 33)
    expected = forward_backward(calls[0], x, -1, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_backward(calls[0], x, -1, backend=backend)
    assert all(map(torch.equal, found, expected))


def test_compiles(calls, cpu):
    x = random(4, 5, 33).requires_grad_()
    compiled = torch.compile(lambda x: calls[0](x * 1, (0, 2), True, backend=cpu), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), calls[0](x, (0, 2), True, backend=cpu))
    (grad,) = torch.autograd.grad(compiled(x).sum(), x)
    assert torch.equal(grad, torch.autograd.grad(calls[0](x, (0, 2), True, backend=cpu).sum(), x)[0])


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"x": X.double()}, TypeError, "x", "torch.float64", "float32, bfloat16 or float16"),
        ({"x": X.long()}, TypeError, "x", "torch.int64", "float32, bfloat16 or float16"),
        ({"x": [1.0]}, TypeError, "x", "list", "a tensor"),
        ({"dim": 2}, ValueError, "dim", "2", r"\(2, 3\)"),
        ({"dim": -3}, ValueError, "dim", "-3", r"\(2, 3\)"),
        ({"dim": 1.0}, TypeError, "dim", "1.0", "an integer"),
        ({"dim": True}, TypeError, "dim", "True", "an integer"),
        ({"dim": (0, -2)}, ValueError, "dim", r"\(0, -2\)", "different"),
        ({"dtype": torch.float64}, TypeError, "dtype", "torch.float64", "float32, bfloat16, float16 or None"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, calls, backend):
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        calls[0](**{"x": X, "dim": 0, "backend": backend, **bad})


def test_the_cpu_backend_refuses_tensors_of_another_device(calls):
    with pytest.raises(RuntimeError, match="'cpu' is unavailable: it runs on CPU tensors, these are on meta"):
        calls[0](X.to(META), 0, backend="cpu")
