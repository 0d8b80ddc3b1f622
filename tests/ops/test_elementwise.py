"""The elementwise functions are as exact as torch's, and the bits of a result depend on the element's value only."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from dtypes import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_batches import assert_as_exact_as_eager

from minirl_kernels import gelu, mish, sigmoid, silu, softplus
from minirl_kernels.backends import native
from minirl_kernels.ops.elementwise import cpu as kernels
from minirl_kernels.ops.elementwise.op import OP

# (the library's function, torch's function)
ACTIVATIONS = {
    "gelu": (gelu, F.gelu),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "mish": (mish, F.mish),
    "sigmoid": (sigmoid, torch.sigmoid),
    "silu": (silu, F.silu),
    "softplus": (softplus, F.softplus),
    "softplus_sharp": (partial(softplus, beta=2.5, threshold=10.0), partial(F.softplus, beta=2.5, threshold=10.0)),
}
aten = torch.ops.aten
# the functions that the mode calls, with the arguments of aten; functions of two tensors take (gradient, x)
KERNELS = {
    "exp2": (kernels.exp2, aten.exp2),
    "gelu": (kernels.gelu, aten.gelu),
    "gelu_backward": (kernels.gelu_backward, aten.gelu_backward),
    "gelu_tanh": (partial(kernels.gelu, approximate="tanh"), partial(aten.gelu, approximate="tanh")),
    "gelu_tanh_backward": (
        partial(kernels.gelu_backward, approximate="tanh"),
        partial(aten.gelu_backward, approximate="tanh"),
    ),
    "mish": (kernels.mish, aten.mish),
    "mish_backward": (kernels.mish_backward, aten.mish_backward),
    "pow": (lambda x: kernels.pow(x, 0.3), lambda x: aten.pow(x, 0.3)),
    "rsqrt": (kernels.rsqrt, aten.rsqrt),
    "sigmoid": (kernels.sigmoid, aten.sigmoid),
    "silu": (kernels.silu, aten.silu),
    "silu_backward": (kernels.silu_backward, aten.silu_backward),
    "softplus": (lambda x: kernels.softplus(x, 2, 20), lambda x: aten.softplus(x, 2, 20)),
    "softplus_backward": (
        lambda grad, x: kernels.softplus_backward(grad, x, 2, 20),
        lambda grad, x: aten.softplus_backward(grad, x, 2, 20),
    ),
}
# dtypes in which torch's vector and scalar code were seen to differ; the others were not
STOCK_DIFFERS = {name: [torch.float32] for name in KERNELS}
STOCK_DIFFERS["rsqrt"] = [torch.bfloat16, torch.float16]
for _name in ("gelu", "gelu_backward", "gelu_tanh", "gelu_tanh_backward"):
    STOCK_DIFFERS[_name] = DTYPES


def values(size, dtype, seed=0):
    """Values of both signs and many magnitudes, most of them near the bends of the functions."""
    gen = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(size, generator=gen)
    x[1::7] *= 8
    x[2::7] *= torch.exp2(torch.randint(-20, 4, x[2::7].shape, generator=gen).float())
    return x.to(dtype)


def operands(name, size, dtype):
    """(x,) or (gradient, x); x is positive for functions that need it."""
    x = values(size, dtype)
    if name in ("pow", "rsqrt"):
        x = x.abs() + 2.0**-10
    return (values(size, dtype, seed=1), x) if name.endswith("_backward") else (x,)


def value_and_gradient(function, x, upstream):
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, upstream.to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients(name, dtype, backend):
    ours, torchs = ACTIVATIONS[name]
    x = torch.cat([values(4003, dtype), torch.linspace(-20, 20, 4001).to(dtype)])
    upstream = values(len(x), dtype, seed=1)
    ours = value_and_gradient(partial(ours, backend=backend), x, upstream)
    eager = value_and_gradient(torchs, x, upstream)
    exact = value_and_gradient(torchs, x.double(), upstream)
    # errors are relative to the element, or to the larger terms whose difference it is
    smallest = 2.0**-6 * torch.stack([torch.ones(len(x)), upstream.abs()]).double()
    for actual, theirs, truth, least in zip(ours, eager, exact, smallest, strict=True):
        assert_as_exact_as_eager(actual, theirs, truth, truth.abs().maximum(least))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["exp2", "pow", "rsqrt"])
def test_values_without_gradients(name, dtype, cpu):
    (x,) = operands(name, 4003, dtype)
    x = x.clamp(-14, 14)  # the range of float16
    ours, torchs = KERNELS[name]
    exact = torchs(x.double())
    assert_as_exact_as_eager(ours(x), torchs(x), exact, exact.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_values(name, dtype, cpu):
    """Infinities, NaN, zeros and the largest numbers give torch's values, and gradients give their limits."""
    ours, torchs = ACTIVATIONS[name]
    largest = torch.finfo(dtype).max
    x = torch.tensor([math.inf, math.nan, 0.0, -0.0, largest, -largest, 100.0, -100.0, 1e-7, -1e-7]).to(dtype)
    expected = torchs(x.double()).to(dtype)
    torch.testing.assert_close(ours(x, backend=cpu), expected, equal_nan=True)
    grad = value_and_gradient(partial(ours, backend=cpu), x, torch.ones_like(x))[1]
    assert grad[1:].isnan().tolist() == [True] + [False] * 8
    limits = [0.0 if name.startswith("sigmoid") else 1.0, 0.0]
    assert grad[4:6].tolist() == grad[6:8].tolist() == limits


def test_small_numbers_keep_their_digits(cpu):
    """Large negative arguments keep their relative accuracy: 1 + tanh or 1 + erf would cancel there."""
    x = torch.linspace(-8, -4, 1001)
    for approximate in ("none", "tanh"):
        if approximate == "none":
            below = torch.tensor([math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()], dtype=torch.float64)
        else:
            below = (math.sqrt(8 / math.pi) * (x.double() + 0.044715 * x.double() ** 3)).sigmoid()
        relative = gelu(x, approximate=approximate, backend=cpu) / (x * below) - 1
        assert relative.abs().max() < 1e-5, approximate


def in_pieces(function, tensors, length):
    return torch.cat([function(*pieces) for pieces in zip(*(x.split(length) for x in tensors), strict=True)])


SIZE = 1920  # a multiple of every vector width


def placed(function, tensors):
    """(name, result) of the same elements in every other place in memory."""
    for length in (1, 3, 15, 31, 100):
        yield f"pieces of {length}", in_pieces(function, tensors, length)
    layouts = {
        "strided": lambda x: torch.empty(SIZE, 2, dtype=x.dtype)[:, 0].copy_(x),
        "short rows": lambda x: torch.empty(SIZE // 5, 9, dtype=x.dtype)[:, :5].copy_(x.view(-1, 5)),
        "transposed": lambda x: x.view(-1, 20).T.contiguous().T,
        "at an odd address": lambda x: torch.empty(SIZE + 1, dtype=x.dtype)[1:].copy_(x),
    }
    for name, lay_out in layouts.items():
        yield name, function(*map(lay_out, tensors)).reshape(-1)
    mixed = [lay_out(x) for lay_out, x in zip((layouts["strided"], torch.clone), tensors, strict=False)]
    yield "one of them strided", function(*mixed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_the_same_bits_in_any_place(name, dtype, cpu):
    ours, torchs = KERNELS[name]
    tensors = operands(name, SIZE, dtype)
    if dtype in STOCK_DIFFERS[name] and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        whole = torchs(*tensors)
        assert any(not torch.equal(out, whole) for _, out in placed(torchs, tensors)), "torch's own does not differ"
    whole = ours(*tensors)
    for place, out in placed(ours, tensors):
        assert torch.equal(out, whole), place


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(KERNELS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 9),
    columns=st.integers(1, 200),
    begin=st.integers(0, 8),
    width=st.integers(1, 200),
)
def test_a_block_of_any_matrix(cpu_kernels, name, dtype, rows, columns, begin, width):
    ours, _ = KERNELS[name]
    tensors = [x.view(rows, columns) for x in operands(name, rows * columns, dtype)]
    whole = ours(*tensors)
    block = (slice(min(begin, rows - 1), None), slice(None, width))
    assert torch.equal(ours(*(x[block] for x in tensors)), whole[block])
    assert torch.equal(ours(*(x[block].contiguous() for x in tensors)), whole[block])


@pytest.fixture(scope="module")
def cpu_kernels():
    """The native kernels, as from `cpu`, in a scope that hypothesis accepts."""
    return native()


@pytest.mark.parametrize("name", KERNELS)
def test_threads(name, cpu, threads):
    """The sizes are on either side of the work of one thread. torch's threads split vectors."""
    ours, torchs = KERNELS[name]
    tensors = operands(name, 3 * (32768 + 15), STOCK_DIFFERS[name][0])
    results, stock = [], []
    for count in (1, 2, 3):
        threads(count)
        results.append(ours(*tensors))
        stock.append(torchs(*tensors))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    if name in ("mish", "rsqrt") and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert not torch.equal(stock[2], stock[0]), "torch's own does not depend on the threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_instruction_set(name, dtype, set_isa):
    tensors = operands(name, 1003, dtype)
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        results.append(KERNELS[name][0](*tensors))
    assert all(torch.equal(result, results[0]) for result in results)


def test_strides_are_torchs_own(cpu):
    """A result has torch's strides, so a view that works without the mode works in it."""
    dense = torch.randn(4, 6, 10)
    inputs = [
        dense,
        dense.transpose(0, 1),
        dense.permute(2, 0, 1),
        dense[:, ::2],
        dense[..., :3].transpose(1, 2),
        dense[:, :1].expand(4, 6, 10),
        dense[0, 0, 0],
        dense[:0],
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    ]
    for x in inputs:
        for out, theirs in (
            (silu(x, backend=cpu), F.silu(x)),
            (kernels.silu_backward(torch.ones_like(x), x), aten.silu_backward(torch.ones_like(x), x)),
        ):
            assert (out.shape, out.stride()) == (theirs.shape, theirs.stride())
            torch.testing.assert_close(out, theirs)


def test_gradients_that_are_expanded_transposed_or_of_another_dtype(cpu):
    x = torch.randn(6, 10)
    expected = aten.silu_backward(torch.ones(6, 10), x)
    leaf = x.clone().requires_grad_()
    silu(leaf, backend=cpu).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
    for grad in (torch.ones(()).expand(6, 10), torch.ones(10, 6).T, torch.ones(6, 10, dtype=torch.bfloat16)):
        torch.testing.assert_close(kernels.silu_backward(grad, x), expected)


def test_second_derivative_is_refused(cpu):
    x, upstream = (torch.randn(3).requires_grad_() for _ in range(2))
    (grad,) = torch.autograd.grad(silu(x, backend=cpu), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "softplus"])
def test_opcheck(name, cpu):
    numbers = (1.0, 20.0)
    for x in (torch.randn(3, 5), torch.randn(5, 3).T, torch.randn(3, 8)[:, ::2], torch.randn(0, 4)):
        torch.library.opcheck(torch.ops.minirl_kernels.elementwise.default, (x, name, *numbers, "cpu"))
        grad = torch.randn(x.shape)
        torch.library.opcheck(torch.ops.minirl_kernels.elementwise_backward.default, (grad, x, name, *numbers, "cpu"))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(compiler, cpu):
    x = torch.randn(3, 17, dtype=torch.bfloat16)

    def call(x):
        gate, up = (2 * x).chunk(2)[0], x[:2]
        return (silu(gate, backend=cpu) * up + gelu(gate, approximate="tanh", backend=cpu)).sum()

    results = []
    for f in (torch.compile(call, fullgraph=True, backend=compiler), call):
        leaf = x.clone().requires_grad_()
        results.append(torch.autograd.grad(f(leaf), leaf)[0])
    assert torch.equal(*results)


def test_autocast(cpu):
    """The dtype of the operand decides, as in torch."""
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert silu(x, backend=cpu).dtype == F.silu(x).dtype == torch.float32
        projected = x @ x.T
        assert silu(projected, backend=cpu).dtype == F.silu(projected).dtype == torch.bfloat16


def test_arguments(cpu):
    x = torch.randn(3)
    for call, error, message in [
        (lambda: silu([1.0]), TypeError, "x is a list: it must be a tensor"),
        (lambda: sigmoid(x.double()), TypeError, r"x has dtype torch\.float64: it must be float32, bfloat16 or"),
        (lambda: gelu(x, approximate="erf"), ValueError, "approximate is 'erf': it must be 'none' or 'tanh'"),
        (lambda: softplus(x, beta=0), ValueError, "beta is 0: it must be above 0 and finite"),
        (lambda: softplus(x, beta="1"), TypeError, "beta is '1': it must be a number"),
        (lambda: softplus(x, threshold=math.nan), ValueError, "threshold is nan: it must be a number"),
        (lambda: mish(x, backend="triton"), ValueError, "mish must be given one of auto, reference, cpu"),
        (lambda: silu(x.to("meta"), backend="cpu"), RuntimeError, "silu: backend 'cpu' is unavailable"),
    ]:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(ValueError, match="function is 'tan', which the kernel does not have"):
        kernels.run("tan", x)


def test_the_functions_of_the_named_backend_run(monkeypatch, cpu):
    """A backend is one file of the op's folder. No other backend's functions may run in its place."""
    calls = []

    def run(function, x, grad, a, b):
        calls.append((function, grad is not None))
        return kernels.run(function, x, grad, a, b)

    monkeypatch.setitem(OP._modules, cpu, SimpleNamespace(run=run))
    x = values(7, torch.float32).requires_grad_()
    silu(x, backend=cpu).sum().backward()
    assert calls == [("silu", False), ("silu", True)]
