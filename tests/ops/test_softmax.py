"""softmax and log_softmax against float64, with extreme logits; the bits of a row depend on the row only."""

import math

import pytest
import torch
from dtypes import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_batches import SLACK, assert_as_exact_as_eager, per_row
from row_bits import (
    assert_same,
    cancelling,
    check_batches,
    check_layouts,
    check_tables,
    check_threads,
    strided,
    sum_by_lanes,
)

from minirl_kernels import log_softmax, softmax
from minirl_kernels.backends import native
from minirl_kernels.ops.softmax import cpu as kernels

# around the widths of vectors, and around the block of a sum
SIZES = [1, 2, 15, 16, 17, 63, 65, 1000, 4095, 4096, 4097, 9000]
CALLS = {"softmax": (softmax, torch.softmax), "log_softmax": (log_softmax, torch.log_softmax)}
META = torch.device("meta")


@pytest.fixture(params=CALLS)
def calls(request):
    """(the library's function, torch's function)"""
    return CALLS[request.param]


def random(*shape, dtype=torch.float32, seed=0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def forward_backward(call, x, upstream, dim=-1, **options):
    leaf = x.detach().requires_grad_()
    out = call(leaf, dim, **options)
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    return out.detach(), grad


def check(calls, x, backend, dim=-1):
    upstream = random(*x.shape, dtype=x.dtype, seed=1)
    found = forward_backward(calls[0], x, upstream, dim, backend=backend)
    eager = forward_backward(calls[1], x, upstream, dim)
    check_against_eager(calls, x, upstream, found, eager, backend, dim)
    if backend == "reference" and x.dtype == torch.float32:
        assert torch.equal(found[1], eager[1])  # both call torch on the same memory


def check_against_eager(calls, x, upstream, found, eager, backend, dim=-1):
    """Compare output and gradient with float64 and eager torch.

    The kernels compute the gradient from the rounded output, as torch does. The reference computes it from the
    unrounded output.
    """
    x, upstream, *results = (values.movedim(dim, -1) for values in (x, upstream, *found, *eager))
    exact = calls[1](x.double(), -1)
    assert_as_exact_as_eager(results[0], results[2], exact, per_row(exact))
    assert results[1].dtype == x.dtype
    if backend == "reference" and x.dtype == torch.float32:
        _, exact_grad = forward_backward(calls[1], x.double(), upstream.double())
        assert_as_exact_as_eager(results[1], results[3], exact_grad, per_row(exact_grad))
    else:
        check_gradient(calls, exact if backend == "reference" else results[0], results[1], upstream)


def check_gradient(calls, output, grad, upstream):
    """The gradient is correctly rounded, up to float32 errors relative to the terms whose difference it is."""
    output, upstream = output.double(), upstream.double()
    if calls[0] is log_softmax:
        exact = upstream - output.exp() * upstream.sum(-1, keepdim=True)
        terms = torch.maximum(upstream.abs(), (upstream - exact).abs())
    else:
        terms = (output * upstream).abs()
        exact = output * (upstream - (output * upstream).sum(-1, keepdim=True))
    rounding = torch.finfo(grad.dtype).eps / 2 * exact.abs() + torch.finfo(grad.dtype).smallest_normal
    assert ((grad.double() - exact).abs() <= rounding + SLACK * terms.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, dtype, calls, backend):
    check(calls, random(5, size, dtype=dtype), backend)


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2, -4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dimension(dim, dtype, calls, backend):
    check(calls, random(3, 4, 5, 17, dtype=dtype), backend, dim)


def test_a_vector(calls, backend):
    check(calls, random(100), backend, 0)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_all_far_from_zero(offset, calls, backend):
    check(calls, random(4, 1025) + offset, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("finite", [slice(2048, 3000), slice(4090, 4500), slice(0, 1), slice(4499, 4500)], ids=str)
def test_minus_infinity_is_no_probability(finite, dtype, calls, backend):
    """Logits of -inf have no effect. Their gradient is 0, for log_softmax the upstream gradient: their exp(q) is 0."""
    x, upstream = random(3, 4500, dtype=dtype), random(3, 4500, dtype=dtype, seed=1)
    masked = torch.full_like(x, -math.inf)
    masked[:, finite] = x[:, finite]
    outside = torch.ones(4500, dtype=torch.bool)
    outside[finite] = False
    log = calls[0] is log_softmax
    if log:
        upstream[:, outside] = 0
    out, grad = forward_backward(calls[0], masked, upstream, backend=backend)
    alone, upstream = x[:, finite], upstream[:, finite]
    eager = forward_backward(calls[1], alone, upstream)
    check_against_eager(calls, alone, upstream, (out[:, finite], grad[:, finite]), eager, backend)
    assert (out[:, outside] == (-math.inf if log else 0.0)).all()
    assert (grad[:, outside] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5, 100, 5000])
def test_what_is_no_number_makes_its_row_none(size, dtype, calls, backend):
    """The results are torch's for NaN, infinity, and rows of -inf only."""
    x = random(6, size, dtype=dtype)
    x[1] = -math.inf
    x[2, size // 2], x[3, size - 1], x[4, 0] = math.nan, math.inf, -math.inf
    out = calls[0](x, -1, backend=backend)
    assert torch.equal(out.isnan(), calls[1](x, -1).isnan())
    assert out[1:4].isnan().all()
    assert not out[[0, 4, 5]].isnan().any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0,)], ids=str)
def test_nothing(shape, calls, backend):
    for dim in range(len(shape)):
        out, grad = forward_backward(calls[0], torch.zeros(shape), torch.zeros(shape), dim, backend=backend)
        assert out.shape == grad.shape == shape


def test_more_than_65535_rows(calls, backend):
    x = random(70_001, 3)
    torch.testing.assert_close(calls[0](x, backend=backend), calls[1](x, -1))


def confident_rows(rows, size, dtype=torch.float32, seed=0):
    """One likely token in each row. The logarithm of its probability is small, and shows the last bit of the sum."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=gen)
    x[torch.arange(rows), torch.randint(size, (rows,), generator=gen)] = 8.0
    return x.to(dtype)


def bits(x):
    """Outputs of both functions, in the dtype of x and in float32."""
    results = []
    for log in (False, True):
        results += [kernels.forward(x, -1, log, x.dtype), kernels.forward(x, -1, log, torch.float32)]
    return tuple(results)


def gradient_bits(output, grad):
    """Gradients of both functions, from the given dtype and from float32.

    Where the upstream gradient is 0, the gradient of softmax is the row's sum times the probability.
    """
    wide = [values.float() for values in (grad, output)]
    return (
        *(kernels.backward(grad, output, -1, log, output.dtype) for log in (False, True)),
        *(kernels.backward(*wide, -1, log, output.dtype) for log in (False, True)),
    )


def gradient_rows(rows, size, dtype=torch.float32, seed=0):
    """(output, its gradient).

    The exact sum of their product is 0: half of a row has no gradient, the other half cancels.
    """
    grad = torch.zeros(rows, size, dtype=dtype)
    grad[:, : size // 2] = cancelling(rows, size // 2, dtype, seed)
    return torch.full((rows, size), 0.375, dtype=dtype), grad


def test_the_data_would_show_another_order():
    x = confident_rows(100, 4096).exp()
    y, grad = gradient_rows(100, 4096)
    for terms in (x / 2**11, (y * grad)[:, :2048]):
        sums = [sum_by_lanes(terms, lanes) for lanes in (8, 16, 32)]
        assert (sums[0] != sums[1]).float().mean() > 0.5
        assert (sums[1] != sums[2]).float().mean() > 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [60, 5000])
def test_a_row_in_any_batch_and_place(size, dtype, cpu):
    """torch's functions keep their bits too on the machines that were tested."""
    x, of_gradient = confident_rows(257, size, dtype), gradient_rows(257, size, dtype)
    few = range(1, 258) if size < 100 else (1, 2, 3, 16, 31, 257)
    check_batches(bits, x, sizes=few)
    check_batches(gradient_bits, *of_gradient, sizes=few)
    check_layouts(bits, x[:40])
    check_layouts(gradient_bits, *(values[:40] for values in of_gradient))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype, cpu, threads):
    check_threads(bits, confident_rows(65, 4100, dtype), threads=threads)
    check_threads(gradient_bits, *gradient_rows(65, 4100, dtype), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set(size, dtype, cpu, set_isa):
    check_tables(bits, confident_rows(7, size, dtype), set_isa=set_isa)
    check_tables(gradient_bits, *gradient_rows(7, size, dtype), set_isa=set_isa)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, cpu, threads, set_isa):
    """A row alone on one thread of the baseline has the bits that it has in a batch, on any table and threads."""
    rows, size = data.draw(st.integers(1, 60)), data.draw(st.one_of(st.integers(1, 200), st.integers(1, 10_000)))
    dtype, row = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, rows - 1))
    seed, padding = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 20))
    x, of_gradient = confident_rows(rows, size, dtype, seed), gradient_rows(rows, size, dtype, seed)
    set_isa("baseline")
    threads(1)
    expected = (*bits(x[row]), *gradient_bits(*(values[row] for values in of_gradient)))
    set_isa(data.draw(st.sampled_from(native().isa_supported())))
    threads(data.draw(st.integers(1, 3)))
    found = (*bits(strided(x, padding)), *gradient_bits(*(strided(values, padding) for values in of_gradient)))
    assert_same([values[row] for values in found], expected)


def test_rows_by_any_strides(calls, cpu):
    x = confident_rows(24, 33).view(2, 3, 4, 33)
    for view in (x[:, 1:], x.transpose(0, 2), x[..., 3:20], x[..., ::2], x.mT, x[:1].expand(5, -1, -1, -1), x[0, :, 1]):
        copy = view.clone(memory_format=torch.contiguous_format)
        upstream = torch.ones(1).expand(view.shape)
        strided_bits = forward_backward(calls[0], view, upstream, backend=cpu)
        assert_same(strided_bits, forward_backward(calls[0], copy, upstream.contiguous(), backend=cpu))


def test_rows_2_to_the_30_apart(tmp_path, calls, cpu):
    """Rows lie 2^30 elements apart in a sparse file of 6 GiB."""
    stride, rows = 2**30, random(3, 1025, dtype=torch.bfloat16)
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 1025, dtype=torch.bfloat16)
    x = file.as_strided((3, 1025), (stride, 1))
    x.copy_(rows)
    assert torch.equal(calls[0](x, backend=cpu), calls[0](rows, backend=cpu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("log", [False, True])
def test_halves_to_float32_and_back(log, dtype, cpu):
    """A softmax of 16-bit logits with a float32 result, and its gradient, follow aten's conversions."""
    x, grad = random(4, 700, dtype=dtype), random(4, 700)
    out = kernels.forward(x, -1, log, torch.float32)
    assert torch.equal(out, kernels.forward(x.float(), -1, log, torch.float32))
    grad_x = kernels.backward(grad, out, -1, log, dtype)
    assert torch.equal(grad_x, kernels.backward(grad, out, -1, log, torch.float32).to(dtype))


def test_gradient_may_be_taken_twice_and_not_of_changed_results(calls, cpu):
    leaf = random(6, 33).requires_grad_()
    out = calls[0](leaf, backend=cpu)
    first, second = (torch.autograd.grad(out[:, 0].sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(dtype, calls, backend):
    x, upstream = random(6, 33, dtype=dtype), random(6, 33, seed=1)
    expected = forward_backward(calls[0], x, upstream, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = forward_backward(calls[0], x, upstream, backend=backend)
    assert found[0].dtype == dtype or backend == "reference"
    if backend != "reference":
        assert_same(found, expected)


@pytest.mark.parametrize("dim", [-1, 1])
def test_compiles(dim, calls, cpu):
    leaf = random(4, 5, 33).requires_grad_()
    compiled = torch.compile(lambda x: calls[0](x * 1, dim, backend=cpu), fullgraph=True, backend="aot_eager")
    out, expected = compiled(leaf), calls[0](leaf, dim, backend=cpu)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    grads = [torch.autograd.grad(values[..., 0].sum(), leaf)[0] for values in (out, expected)]
    assert torch.equal(*grads)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"x": X.double()}, TypeError, "x", "torch.float64", "float32, bfloat16 or float16"),
        ({"x": X.long()}, TypeError, "x", "torch.int64", "float32, bfloat16 or float16"),
        ({"x": [1.0]}, TypeError, "x", "list", "a tensor"),
        ({"x": X[0, 0]}, ValueError, "dim", "-1", r"\(\)"),
        ({"dim": 2}, ValueError, "dim", "2", r"\(2, 3\)"),
        ({"dim": None}, TypeError, "dim", "None", "an integer"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, calls, backend):
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        calls[0](**{"x": X, "backend": backend, **bad})


def test_the_cpu_backend_refuses_tensors_of_another_device(calls):
    with pytest.raises(RuntimeError, match="'cpu' is unavailable: it runs on CPU tensors, these are on meta"):
        calls[0](X.to(META), backend="cpu")
