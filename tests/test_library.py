"""The folder of an op has one file for each backend, which is imported at its first use."""

import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from minirl_kernels import batch_invariant_mode, rms_norm, softmax
from minirl_kernels.common import library

CPU = torch.device("cpu")


@pytest.fixture
def make_op(tmp_path, monkeypatch):
    """Makes an op from a folder with the given files; the op is removed after the test."""
    monkeypatch.setattr(library, "OPS", [])
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**files):
        folder = tmp_path / "toy_op"
        folder.mkdir()
        for name, text in {"__init__": "", **files}.items():
            (folder / f"{name}.py").write_text(text)
        return library.Op("toy_op")

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_op"]:
        del sys.modules[name]


def test_a_backend_is_one_file(make_op):
    op = make_op(cpu="def forward(x): return 2 * x\n", triton="raise ImportError('needs a GPU')\n")
    assert op.name == "toy_op"
    assert op.backends == ("reference", "cpu", "triton")
    assert op.resolve("auto", CPU) == "cpu"
    assert op.kernels("cpu").forward(3) == 6
    assert op.kernels("cpu") is op.kernels("cpu")
    with pytest.raises(ImportError, match="needs a GPU"):
        op.kernels("triton")


def test_no_backend_is_imported_before_it_is_asked_for(make_op):
    op = make_op(cpu="", triton="raise ImportError\n")
    assert "toy_op.cpu" not in sys.modules
    op.kernels("cpu")
    assert "toy_op.cpu" in sys.modules


def test_an_op_without_a_file_for_the_backend(make_op):
    op = make_op(cpu="")
    assert op.resolve("auto", torch.device("cuda")) == "reference"
    with pytest.raises(ValueError, match=r"backend is 'triton'; toy_call must be given one of auto, reference, cpu"):
        op.resolve("triton", CPU, "toy_call")
    for backend in ("triton", "reference", "op"):
        with pytest.raises(ValueError, match=rf"backend is '{backend}': the kernels of toy_op must be of one of cpu"):
            op.kernels(backend)


def test_resolve_is_a_constant_to_torch_compile(make_op):
    op = make_op(cpu="")
    compiled = torch.compile(
        lambda x: x * (2 if op.resolve("auto", x.device) == "cpu" else 3), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))


class Dispatched(TorchDispatchMode):
    """The names of the operations that the dispatcher shows to a mode."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_a_mode_sees_the_ops(cpu):
    x = torch.randn(3, 8, requires_grad=True)
    with Dispatched() as seen:
        softmax(x, backend=cpu).sum().backward()
    assert {"minirl_kernels::softmax", "minirl_kernels::softmax_backward"} <= set(seen.names)


def test_a_function_mode_sees_the_ops(cpu):
    class Called(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **kwargs or {})

    names = []
    with Called():
        softmax(torch.randn(3, 8), backend=cpu)
    assert "minirl_kernels.softmax.default" in names


def test_the_profiler_lists_the_ops(cpu):
    with torch.profiler.profile() as found:
        softmax(torch.randn(3, 8), backend=cpu)
    assert "minirl_kernels::softmax" in {event.key for event in found.key_averages()}


def test_a_trace_of_jit_holds_the_ops(cpu):
    traced = torch.jit.trace(lambda x: library_op(x, cpu), torch.randn(3, 8))
    assert "minirl_kernels::softmax" in str(traced.graph)


def library_op(x, backend):
    from minirl_kernels.ops.softmax.op import softmax_forward

    return softmax_forward(x, -1, False, backend)


def test_a_subclass_of_tensor_gets_the_ops(cpu):
    class Refusing(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise TypeError(f"refused {func.name()}")

    x = torch.Tensor._make_subclass(Refusing, torch.randn(3, 8))
    with pytest.raises(TypeError, match="refused minirl_kernels::softmax"):
        library_op(x, cpu)


def test_vmap_is_a_loop_over_the_op(cpu):
    """A kernel must never read the memory of a wrapped tensor."""
    x = torch.randn(2, 3, 8)
    assert torch.equal(torch.func.vmap(lambda x: library_op(x, cpu), in_dims=1, out_dims=1)(x), library_op(x, cpu))


def test_an_op_alone_records_no_graph_of_its_own_operations(cpu):
    """The gradient of an op is that of the autograd.Function around it."""
    out = library_op(torch.randn(3, 8, requires_grad=True), cpu)
    assert out.grad_fn.name().endswith("WarnNotImplemented")


@pytest.mark.parametrize("enabled", [False, True])
def test_both_ways_to_an_op_give_the_same_bits(enabled, cpu):
    x, weight = torch.randn(5, 33, requires_grad=True), torch.randn(33, requires_grad=True)

    def run():
        out = rms_norm(x, weight, 1e-6, backend=cpu)
        return out.detach(), *torch.autograd.grad(out.sum(), (x, weight))

    with batch_invariant_mode(enabled):
        direct = run()
        with Dispatched():
            dispatched = run()
    assert all(map(torch.equal, direct, dispatched))
