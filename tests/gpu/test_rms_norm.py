"""The Triton kernels of rms_norm on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from rms_norm_cases import check_rms_norm
from row_bits import cancelling
from triton_cases import random_logits

from minirl_kernels.ops.rms_norm.triton import backward, forward

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 257, 1000, 4097, 20_011, 50_257])
def test_any_size(size, dtype):
    check_rms_norm(random_logits(5, size, dtype=dtype), random_logits(size, dtype=dtype, seed=2), device=DEVICE)
    check_rms_norm(random_logits(5, size, dtype=dtype), None, device=DEVICE)


def test_more_than_65535_rows():
    check_rms_norm(random_logits(70_000, 33), random_logits(33, seed=2), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [999, 2048, 20_011])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(size, dtype):
    x = cancelling(257, size, dtype).to(DEVICE)
    grad = random_logits(257, size, dtype=dtype).to(DEVICE)

    def bits(x, grad):
        out, rstd = forward(x, None, 1e-6)
        return out, rstd, backward(grad, x, None, rstd, True, False)[0]

    together = bits(x, grad)
    for rows in (slice(0, 1), slice(17, 20), slice(256, 257), slice(3, 131)):
        alone = bits(x[rows].clone(), grad[rows].clone())
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))


def test_the_gradient_of_the_weight_run_to_run():
    grad = cancelling(513, 9000).T.contiguous().to(DEVICE)
    ones = torch.ones_like(grad)
    runs = [backward(grad, ones, None, ones[:, :1].contiguous(), False, True)[1] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [100, 999, 20_000])
def test_the_gradient_of_a_weight_has_the_same_bits_beside_any_number_of_weights(rows, dtype):
    """Also with odd strides, with memory that starts off by one element, and with rows in batch entries."""
    grad, x = (cancelling(300, rows, dtype, seed=seed).T.contiguous().to(DEVICE) for seed in (0, 1))
    rstd = torch.rand(rows, 1, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def bits(grad, x):
        return backward(grad, x, None, rstd, False, True)[1]

    together = bits(grad, x)
    for count in (*range(1, 301, 7), 8, 64, 128, 256, 300):
        assert torch.equal(bits(grad[:, :count], x[:, :count]), together[:count])
        assert torch.equal(bits(grad[:, :count].contiguous(), x[:, :count].contiguous()), together[:count])
    for padding, offset in ((0, 1), (1, 0), (3, 1), (8, 8)):
        storage = torch.zeros(rows * (300 + padding) + offset, dtype=dtype, device=DEVICE)
        view = storage.as_strided((rows, 300), (300 + padding, 1), offset).copy_(x)
        assert torch.equal(bits(grad, view), together)
    entries = torch.zeros(rows // 5 + 1, 7, 300, dtype=dtype, device=DEVICE)[: rows // 5, :5]
    whole = rows // 5 * 5
    entries.copy_(x[:whole].view(-1, 5, 300))
    ones = backward(grad[:whole].view(-1, 5, 300), entries, None, rstd[:whole], False, True)[1]
    assert torch.equal(ones, backward(grad[:whole], x[:whole], None, rstd[:whole], False, True)[1])
