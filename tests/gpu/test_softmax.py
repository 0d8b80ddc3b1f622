"""The Triton kernels of softmax and log_softmax on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from triton_cases import check_softmax, random_logits

from minirl_kernels import log_softmax, softmax
from minirl_kernels.ops.softmax import triton as kernels

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 257, 1000, 4097, 20_011, 50_257, 151_936])
@pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])
def test_any_size(log, size, dtype):
    check_softmax(random_logits(5, size, dtype=dtype), log, device=DEVICE)


def test_other_dimensions_and_many_rows():
    check_softmax(random_logits(3, 40, 50), True, 1, device=DEVICE)
    check_softmax(random_logits(70_000, 33), False, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [999, 1024, 50_257])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(size, dtype):
    x, grad = (random_logits(257, size, dtype=dtype, seed=seed).to(DEVICE) for seed in (0, 1))

    def bits(x, grad):
        outputs = softmax(x), log_softmax(x)
        grads = (kernels.backward(grad, out, -1, log, dtype) for log, out in enumerate(outputs))
        return *outputs, *grads

    together = bits(x, grad)
    for rows in (slice(0, 1), slice(17, 20), slice(256, 257), slice(3, 131)):
        alone = bits(x[rows].clone(), grad[rows].clone())
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))
