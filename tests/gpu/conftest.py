import pytest
import torch


@pytest.fixture(autouse=True)
def gpu():
    """Every test in this folder launches kernels, so it needs a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible to torch; tests/ops and tests/verify say what is known without one")
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=1 keeps the kernels off the GPU")
