import subprocess
import sys

import pytest
import torch

from minirl_kernels import backends

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
ALL = ("reference", "cpu", "triton")


def resolve(backend, device, supported=ALL):
    return backends.resolve(backend, device, op="toy", supported=supported)


@pytest.fixture
def no_native(monkeypatch):
    """The package as it is when installed with MINIRL_NO_NATIVE=1."""
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "_native_reason", None)
    monkeypatch.setitem(sys.modules, "minirl_kernels._C", None)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("MINIRL_NO_NATIVE", "MINIRL_ISA", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)


def test_auto_follows_the_device():
    assert resolve("auto", CPU) == "cpu"
    assert resolve("auto", CUDA) == "triton"
    assert resolve("auto", MPS) == "reference"


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_of_an_op_without_kernels(device):
    assert resolve("auto", device, supported=("reference",)) == "reference"


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_reference_runs_anywhere(device):
    assert resolve("reference", device) == "reference"


@pytest.mark.parametrize("name", ["gpu", "", "Triton", "cuda"])
def test_unknown_or_unsupported_name(name):
    with pytest.raises(ValueError, match=rf"backend is '{name}'; toy .* auto, reference, cpu, triton"):
        resolve(name, CPU, supported=("reference", "cpu", "triton"))


@pytest.mark.parametrize(
    ("backend", "device", "reason"),
    [
        ("cpu", CUDA, "it runs on CPU tensors, these are on cuda"),
        ("triton", CPU, "it runs on CUDA tensors, these are on cpu .*TRITON_INTERPRET=1"),
        ("triton", MPS, "it runs on CUDA tensors, these are on mps"),
    ],
)
def test_explicit_backend_never_falls_back(backend, device, reason):
    assert backends.unavailable_reason(backend, device) is not None
    with pytest.raises(RuntimeError, match=rf"toy: backend '{backend}' is unavailable: .*{reason}"):
        resolve(backend, device)


def test_triton_on_cpu_tensors_under_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("triton", CPU) == "triton"
    assert resolve("auto", CPU) == "cpu"
    assert backends.unavailable_reason("triton", MPS) is not None


def test_triton_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        resolve("auto", CUDA)


def test_missing_native_module_is_an_error(no_native):
    for backend in ("auto", "cpu"):
        with pytest.raises(RuntimeError, match="_C"):
            resolve(backend, CPU)
    with pytest.raises(RuntimeError, match="_C"):
        backends.native()
    assert "cpu" not in backends.available()


def test_missing_native_module_where_that_is_wanted(no_native, monkeypatch):
    monkeypatch.setenv("MINIRL_NO_NATIVE", "1")
    assert resolve("auto", CPU) == "reference"
    with pytest.raises(RuntimeError, match="unavailable"):
        resolve("cpu", CPU)


def test_no_native_says_nothing_where_a_native_module_exists(monkeypatch):
    monkeypatch.setenv("MINIRL_NO_NATIVE", "1")
    assert resolve("auto", CPU) == "cpu"


@pytest.mark.parametrize(("has_sources", "advice"), [(True, "pip install -e"), (False, "MINIRL_NO_NATIVE=1 at build")])
def test_advice_when_the_native_module_is_missing(has_sources, advice, monkeypatch, tmp_path):
    if has_sources:
        (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "minirl_kernels" / "backends.py"))
    missing = ModuleNotFoundError("No module named 'minirl_kernels._C'", name="minirl_kernels._C")
    assert advice in backends._why_not_loaded(missing)
    assert "undefined symbol: x" in backends._why_not_loaded(ImportError("undefined symbol: x"))


def test_unavailable_reason_of_an_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'auto'; it must be one of reference, cpu, triton"):
        backends.unavailable_reason("auto")


def test_available_and_status_agree():
    status = backends.status()
    assert list(status["backends"]) == list(ALL)
    assert tuple(name for name, entry in status["backends"].items() if entry["available"]) == backends.available()
    assert all(entry["available"] == (entry["reason"] is None) for entry in status["backends"].values())
    native = status["native"]
    assert native["picked"] in native["supported"]
    assert set(native["supported"]) <= set(native["built"])
    assert native["built"][0] == "baseline"
    assert native["threads"] == "torch's pool"


def test_status_without_native_module(no_native):
    native = backends.status()["native"]
    assert native["built"] == native["supported"] == []
    assert native["picked"] is None
    assert "_C" in native["why"]


def test_status_after_set_isa(set_isa):
    set_isa("baseline")
    native = backends.status()["native"]
    assert native["picked"] == "baseline"
    assert "no fused multiply-add" in native["matmul"]


def test_set_isa_names_the_choices():
    with pytest.raises(ValueError, match=r"sse9.*baseline"):
        backends.native().set_isa("sse9")


def test_one_native_module():
    assert backends.native() is backends.native()


def run_with_isa(isa, code, monkeypatch, tmp_path):
    monkeypatch.setenv("MINIRL_ISA", isa)
    code = f"from minirl_kernels import backends; {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)


def test_isa_from_the_environment(monkeypatch, tmp_path):
    result = run_with_isa("baseline", "print(backends.status()['native']['why'])", monkeypatch, tmp_path)
    assert result.stdout.strip() == "MINIRL_ISA=baseline"


def test_unknown_isa_in_the_environment(monkeypatch, tmp_path):
    result = run_with_isa("sse9", "backends.native()", monkeypatch, tmp_path)
    assert result.stderr.splitlines()[-1].startswith("RuntimeError")
    for word in ("MINIRL_ISA", "sse9", "baseline"):
        assert word in result.stderr.splitlines()[-1]


def test_resolve_is_a_constant_to_torch_compile():
    def double_on_the_cpu_backend(x):
        return x * (2 if resolve("auto", x.device) == "cpu" else 3)

    compiled = torch.compile(double_on_the_cpu_backend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
