import os
from unittest import mock

import numpy as np
import pytest
import torch

from minirl_kernels import backends

# Triton uses its interpreter on machines without a GPU. It reads this variable at its first import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """One thread, unless a test asks for more.

    The error of an eager sum depends on the number of threads, and many tests use this error as their bound. The
    workers of pytest-xdist start after this call and share the cores. Their threads would wait for each other.
    """
    torch.set_num_threads(1)
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


# Their longest tests each wait for a process that compiles, measures or runs a model.
STARTED_FIRST = ("test_layout.py", "test_compile_matrix.py", "test_gpu.py", "test_transformers_wrappers.py")


def pytest_collection_modifyitems(items):
    """At the end of the run, no worker waits for a long test of the other."""
    items.sort(key=lambda item: item.path.name not in STARTED_FIRST)


@pytest.fixture(scope="session", autouse=True)
def interpreted_dot():
    """The interpreter's products have one order of summation for every element. BLAS for Haswell has several."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        dtype = d.data.dtype
        product = np.einsum("...mk,...kn->...mn", a.data.astype(dtype), np.ascontiguousarray(b.data, dtype))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        yield


@pytest.fixture
def cpu():
    """The backend's name of the native kernels.

    Without the kernels, tests fail unless MINIRL_NO_NATIVE=1 is set; then they are skipped.
    """
    if os.environ.get("MINIRL_NO_NATIVE") == "1":
        pytest.skip("MINIRL_NO_NATIVE=1")
    return "cpu"


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that runs on this machine."""
    return request.getfixturevalue("cpu") if request.param == "cpu" else request.param


@pytest.fixture
def threads():
    """torch.set_num_threads; the number of threads is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_isa(cpu):
    """A function that selects the kernels of an instruction set; the selection is restored after the test."""
    native = backends.native()
    before = native.isa_picked()
    yield native.set_isa
    native.set_isa(before)
