import os

import pytest
import torch

from minirl_kernels import backends


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that runs on this machine; a missing native build fails, unless it was asked for."""
    if request.param == "cpu" and os.environ.get("MINIRL_NO_NATIVE") == "1":
        pytest.skip("MINIRL_NO_NATIVE=1")
    return request.param


@pytest.fixture
def threads():
    """Sets the number of torch's threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def set_isa():
    """Picks the table of kernels of an instruction set, and puts back the one that was picked."""
    native = backends.native()
    before = native.isa_picked()
    yield native.set_isa
    native.set_isa(before)
