import os
from unittest import mock

import numpy as np
import pytest
import torch

from minirl_kernels import backends

# Triton runs its kernels in its interpreter where no GPU can; it asks once, when somebody first imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    """One thread, unless a test asks for more: the error of an eager sum, which many a bar is, depends on how many.

    Workers of pytest-xdist, which start after this, share the cores: threads that share one wait for each other.
    """
    torch.set_num_threads(1)
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def interpreted_dot():
    """The interpreter's products in one order for every element: BLAS for Haswell has others for some rows."""
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
    """The native kernels by their backend's name; where they are missing the tests fail, unless that was asked for."""
    if os.environ.get("MINIRL_NO_NATIVE") == "1":
        pytest.skip("MINIRL_NO_NATIVE=1")
    return "cpu"


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that runs on this machine."""
    return request.getfixturevalue("cpu") if request.param == "cpu" else request.param


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_isa(cpu):
    """Picks the table of kernels of an instruction set, and puts back the one that was picked."""
    native = backends.native()
    before = native.isa_picked()
    yield native.set_isa
    native.set_isa(before)
