"""The folder of an op has one file for each backend, which is imported at its first use."""

import sys

import pytest
import torch

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
