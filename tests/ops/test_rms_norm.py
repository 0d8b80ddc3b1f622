"""rms_norm against float64: values and both gradients. The bits of a row depend on the row and the weight only."""

import math

import pytest
import torch
from dtypes import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_batches import assert_as_exact_as_eager, per_row
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
from torch.nn import functional as F

from minirl_kernels import rms_norm
from minirl_kernels.backends import native
from minirl_kernels.ops.rms_norm import aten
from minirl_kernels.ops.rms_norm import cpu as kernels

# around the widths of vectors and strips, and around the block of a sum
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 128, 1000, 4095, 4097, 9000]
EPS = 1e-6
META = torch.device("meta")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight_of(size, dtype=torch.float32):
    return 1 + random(size, dtype=dtype, seed=2) / 4


def forward_backward(call, x, weight, upstream):
    """(out, d x, d weight), with None for a gradient without its operand."""
    leaves = [x.detach().requires_grad_()] + ([] if weight is None else [weight.detach().requires_grad_()])
    out = call(*leaves, *[None] * (2 - len(leaves)))
    grads = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return (out.detach(), *grads, *[None] * (2 - len(leaves)))


def ours(backend, eps=EPS):
    return lambda x, weight: rms_norm(x, weight, eps, backend=backend)


def theirs(x, weight, eps=EPS):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def check(x, weight, backend):
    upstream = random(*x.shape, dtype=x.dtype, seed=1)
    found = forward_backward(ours(backend), x, weight, upstream)
    eager = forward_backward(theirs, x, weight, upstream)
    wide = None if weight is None else weight.double()
    exact = forward_backward(theirs, x.double(), wide, upstream.double())
    # d x is a difference: its error is relative to its first term
    first = upstream.double() * (1 if weight is None else wide) / (x.double().square().mean(-1, True) + EPS).sqrt()
    scales = (per_row(exact[0]), per_row(first), None)
    for result, of_torch, truth, scale in zip(found, eager, exact, scales, strict=True):
        if truth is None:
            assert result is None
        else:
            assert_as_exact_as_eager(result, of_torch, truth, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, dtype, backend):
    check(random(5, size, dtype=dtype), weight_of(size, dtype), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_weight(dtype, backend):
    check(random(3, 4, 65, dtype=dtype), None, backend)


@pytest.mark.parametrize("shape", [(33,), (2, 3, 4, 33)], ids=str)
def test_any_shape_of_rows(shape, backend):
    check(random(*shape), weight_of(33), backend)


def test_more_rows_than_a_block_of_their_sum(backend):
    check(random(9000, 70), weight_of(70), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_beside_halves(dtype, backend):
    """Mixed-precision training keeps a float32 weight: the result has the dtype of x, d weight the weight's."""
    x, weight, upstream = random(50, 65, dtype=dtype), weight_of(65), random(50, 65, dtype=dtype, seed=1)
    out, grad_x, grad_weight = forward_backward(ours(backend), x, weight, upstream)
    exact = forward_backward(theirs, x.double(), weight.double(), upstream.double())
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    assert_as_exact_as_eager(out, exact[0].to(dtype), exact[0])
    assert_as_exact_as_eager(grad_weight, exact[2].float(), exact[2])


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15])
def test_very_small_and_very_large_rows(scale, cpu):
    """eps dominates the denominator, or is negligible, or x^3 exceeds float32.

    The gradient of the reference overflows in the last case.
    """
    x, weight, upstream = random(4, 100) * scale, weight_of(100), random(4, 100, seed=1)
    found = forward_backward(ours(cpu), x, weight, upstream)
    exact = forward_backward(theirs, x.double(), weight.double(), upstream.double())
    for result, truth in zip(found, exact, strict=True):
        assert result.isfinite().all()
        assert_as_exact_as_eager(result, truth.float(), truth)


def test_zeros_and_no_eps(cpu):
    assert torch.equal(rms_norm(torch.zeros(2, 5), None, 1e-6, backend=cpu), torch.zeros(2, 5))
    assert rms_norm(torch.zeros(2, 5), None, 0, backend=cpu).isnan().all()


def test_what_is_no_number_makes_its_row_none(backend):
    x = random(4, 100)
    x[1, 99], x[2, 3] = math.nan, math.inf
    out = rms_norm(x, weight_of(100), EPS, backend=backend)
    assert out[1].isnan().all()
    assert out[2, 3].isnan()
    assert out[[0, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_rows(shape, backend):
    out, grad_x, grad_weight = forward_backward(ours(backend), torch.zeros(shape), weight_of(5), torch.zeros(shape))
    assert out.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(5))


def bits(x, weight):
    """(out, rstd). rstd shows the last bit of the sum, also where out is rounded."""
    return kernels.forward(x, weight, EPS)


def gradient_bits(x, grad):
    """d x without a weight and with rstd 1. Where grad is 0, d x is the row's sum times x."""
    return kernels.backward(grad, x, None, torch.ones(len(x), 1), True, False)[:1]


def sensitive(rows, size, dtype=torch.float32, seed=0):
    """x whose squares cover many powers of two."""
    return cancelling(rows, size, dtype, seed) / 4


def gradient_rows(rows, size, dtype=torch.float32, seed=0):
    """(x, grad). The exact sum of their product is 0: half of a row has no gradient, the other half cancels."""
    grad = torch.zeros(rows, size, dtype=dtype)
    grad[:, : size // 2] = cancelling(rows, size // 2, dtype, seed)
    return torch.full((rows, size), 0.75, dtype=dtype), grad


def test_the_data_would_show_another_order():
    x, (y, grad) = sensitive(100, 4096), gradient_rows(100, 4096)
    for terms, most in ((x * x, 0.2), ((y * grad)[:, :2048], 0.9)):
        sums = [sum_by_lanes(terms, lanes) for lanes in (8, 16, 32)]
        assert (sums[0] != sums[1]).float().mean() > most
        assert (sums[1] != sums[2]).float().mean() > most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [60, 5000])
def test_a_row_in_any_batch_and_place(size, dtype, cpu):
    """torch's rms_norm keeps its bits too on the machines that were tested."""
    x, of_gradient = sensitive(257, size, dtype), gradient_rows(257, size, dtype)
    few = range(1, 258) if size < 100 else (1, 2, 3, 16, 31, 257)

    def with_weight(x):
        return bits(x, weight_of(size, dtype))

    check_batches(with_weight, x, sizes=few)
    check_batches(gradient_bits, *of_gradient, sizes=few)
    check_layouts(with_weight, x[:40])
    check_layouts(gradient_bits, *(values[:40] for values in of_gradient))


def weight_gradient(rows, size, dtype):
    """d weight of a gradient that cancels in the sum over the rows."""
    grad = cancelling(size, rows, dtype).T.contiguous()
    return kernels.backward(grad, torch.ones_like(grad), None, torch.ones(rows, 1), False, True)[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [5, 1000, 9000])
def test_the_gradient_of_the_weight_by_any_threads_and_table(rows, dtype, cpu, threads, set_isa):
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        for count in (1, 2, 3):
            threads(count)
            results.append(weight_gradient(rows, 70, dtype))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype, cpu, threads):
    check_threads(lambda x: bits(x, None), sensitive(65, 4100, dtype), threads=threads)
    check_threads(gradient_bits, *gradient_rows(65, 4100, dtype), threads=threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_instruction_set(size, dtype, cpu, set_isa):
    check_tables(lambda x: bits(x, weight_of(size, dtype)), sensitive(7, size, dtype), set_isa=set_isa)
    check_tables(gradient_bits, *gradient_rows(7, size, dtype), set_isa=set_isa)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data, cpu, threads, set_isa):
    """A row alone on one thread of the baseline has the bits that it has in a batch, on any table and threads."""
    rows, size = data.draw(st.integers(1, 60)), data.draw(st.one_of(st.integers(1, 200), st.integers(1, 10_000)))
    dtype, row = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, rows - 1))
    seed, padding = data.draw(st.integers(0, 2**31)), data.draw(st.integers(0, 20))
    x, of_gradient = sensitive(rows, size, dtype, seed), gradient_rows(rows, size, dtype, seed)
    weight = weight_of(size, dtype)
    one = slice(row, row + 1)
    set_isa("baseline")
    threads(1)
    expected = (*bits(x[one], weight), *gradient_bits(*(values[one] for values in of_gradient)))
    set_isa(data.draw(st.sampled_from(native().isa_supported())))
    threads(data.draw(st.integers(1, 3)))
    found = (*bits(strided(x, padding), weight), *gradient_bits(*(strided(values, padding) for values in of_gradient)))
    assert_same([values[one] for values in found], expected)


def test_rows_by_any_strides(cpu):
    x = sensitive(24, 33).view(2, 3, 4, 33)
    for view in (x[:, 1:], x.transpose(0, 2), x[..., 3:20], x[..., ::2], x.mT, x[:1].expand(5, -1, -1, -1), x[0, :, 1]):
        copy = view.clone(memory_format=torch.contiguous_format)
        weight = weight_of(view.shape[-1]).repeat_interleave(2)[::2]
        upstream = torch.ones(1).expand(view.shape)
        by_strides = forward_backward(ours(cpu), view, weight, upstream)
        assert_same(by_strides, forward_backward(ours(cpu), copy, weight.clone(), upstream.contiguous()))


def test_rows_2_to_the_30_apart(tmp_path, cpu):
    """Rows lie 2^30 elements apart in a sparse file of 6 GiB."""
    stride, rows = 2**30, random(3, 1025, dtype=torch.bfloat16)
    file = torch.from_file(str(tmp_path / "x"), shared=True, size=2 * stride + 1025, dtype=torch.bfloat16)
    x = file.as_strided((3, 1025), (stride, 1))
    x.copy_(rows)
    of_file, of_rows = (forward_backward(ours(cpu), values, weight_of(1025), rows) for values in (x, rows))
    assert_same(of_file, of_rows)


@pytest.mark.parametrize(("of_x", "of_weight"), [(True, True), (True, False), (False, True)])
def test_gradients_that_are_wanted(of_x, of_weight, backend):
    """Each gradient is the same with and without the other one."""
    x, weight, upstream = random(7, 33), weight_of(33), random(7, 33, seed=1)
    both = forward_backward(ours(backend), x, weight, upstream)[1:]
    leaves = [x.clone().requires_grad_(of_x), weight.clone().requires_grad_(of_weight)]
    rms_norm(*leaves, EPS, backend=backend).backward(upstream)
    for leaf, wanted, grad in zip(leaves, (of_x, of_weight), both, strict=True):
        assert torch.equal(leaf.grad, grad) if wanted else leaf.grad is None


def test_gradient_may_be_taken_twice(backend):
    x = random(7, 33).requires_grad_()
    out = rms_norm(x, weight_of(33), EPS, backend=backend)
    first, second = (torch.autograd.grad(out[:, 0].sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(dtype, cpu):
    arguments = random(6, 33, dtype=dtype), weight_of(33, dtype), random(6, 33, seed=1)
    expected = forward_backward(ours(cpu), *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(forward_backward(ours(cpu), *arguments), expected)


def test_compiles(cpu):
    x, weight = random(4, 5, 33).requires_grad_(), weight_of(33).requires_grad_()
    compiled = torch.compile(lambda x, w: rms_norm(x * 1, w, EPS, backend=cpu), fullgraph=True, backend="aot_eager")
    out, expected = compiled(x, weight), rms_norm(x, weight, EPS, backend=cpu)
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(values[..., 0].sum(), (x, weight)) for values in (out, expected)]
    assert_same(*grads)


def test_the_default_dtype_changes_nothing(cpu):
    """The row's factor is float32 whatever torch.empty makes by default."""
    x = random(3, 7)
    expected = rms_norm(x, None, EPS, backend=cpu)
    torch.set_default_dtype(torch.float64)
    try:
        found = rms_norm(x, None, EPS, backend=cpu)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


X, WEIGHT = torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"x": X.double()}, TypeError, "x", "torch.float64", "float32, bfloat16 or float16"),
        ({"x": [1.0]}, TypeError, "x", "list", "a tensor"),
        ({"x": X[0, 0]}, ValueError, "x", r"\(\)", "one dimension or more"),
        ({"x": X[:, :0]}, ValueError, "x", r"\(2, 0\)", "not be empty"),
        ({"weight": WEIGHT[:2]}, ValueError, "weight", r"\(2,\)", r"\(3,\)"),
        ({"weight": WEIGHT.double()}, TypeError, "weight", "torch.float64", "float32, bfloat16 or float16"),
        ({"weight": WEIGHT.to(META)}, ValueError, "weight", "meta", "cpu"),
        ({"weight": 1.0}, TypeError, "weight", "float", "a tensor"),
        ({"eps": -1e-6}, ValueError, "eps", "-1e-06", "from 0 on"),
        ({"eps": math.nan}, ValueError, "eps", "nan", "from 0 on"),
        ({"eps": math.inf}, ValueError, "eps", "inf", "finite"),
        ({"eps": None}, TypeError, "eps", "None", "a number"),
        ({"eps": True}, TypeError, "eps", "True", "a number"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        rms_norm(**{"x": X, "weight": WEIGHT, "eps": EPS, "backend": backend, **bad})


def test_the_cpu_backend_refuses_tensors_of_another_device():
    with pytest.raises(RuntimeError, match="'cpu' is unavailable: it runs on CPU tensors, these are on meta"):
        rms_norm(X.to(META), None, EPS, backend="cpu")


@pytest.mark.parametrize("with_weight", [True, False])
def test_rms_norm_in_the_words_of_a_gpu(with_weight):
    """torch has an operation for rms_norm on a GPU; its arguments give the same results in the CPU's kernels."""
    x, weight = random(7, 64).requires_grad_(), random(64, seed=1).requires_grad_() if with_weight else None
    upstream = random(7, 64, seed=2)
    expected = F.rms_norm(x, (64,), weight, 1e-5)
    out, rstd = aten.rms_norm(kernels, x.detach(), [64], None if weight is None else weight.detach(), 1e-5)
    torch.testing.assert_close(out, expected)
    grads = aten.rms_norm_backward(kernels, upstream, x.detach(), [64], rstd, weight, [True, with_weight])
    leaves = (x, weight) if with_weight else (x,)
    for grad, right in zip(grads, torch.autograd.grad(expected, leaves, upstream), strict=False):
        torch.testing.assert_close(grad.detach(), right)
    assert aten.rms_norm(kernels, x, [7, 64], None, 1e-5) is NotImplemented
    assert aten.rms_norm(kernels, x, [64], None, None) is NotImplemented
