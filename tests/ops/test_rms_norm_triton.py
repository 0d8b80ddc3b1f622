"""The Triton kernels of rms_norm in Triton's interpreter: values and masks; hardware is not tested."""

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from rms_norm_cases import check_rms_norm
from row_bits import strided
from torch.nn import functional as F
from triton_cases import random_logits
from verify.launches import captured

from minirl_kernels import rms_norm
from minirl_kernels.batch_invariant.operations import operations
from minirl_kernels.ops.rms_norm import triton as kernels

pytestmark = triton_cases.interpreter_only()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 5, 257, 1000, 1024, 4097])
def test_any_size(size, dtype):
    check_rms_norm(random_logits(3, size, dtype=dtype), random_logits(size, dtype=dtype, seed=2))


@pytest.mark.parametrize("size", [20_011, 24_000], ids=["odd", "aligned"])
def test_rows_of_many_tiles(size):
    check_rms_norm(random_logits(2, size), random_logits(size, seed=2))
    check_rms_norm(random_logits(1, size, dtype=torch.bfloat16), None)


def test_any_strides():
    x = random_logits(2, 3, 4, 40)
    weight = random_logits(80, seed=2)[::2]
    for view in (x[:, 1:, :, 3:], x.transpose(0, 1), x[0], x[0, 0, 0]):
        check_rms_norm(view, weight[: view.shape[-1]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_beside_halves(dtype):
    x, weight, grad = random_logits(4, 130, dtype=dtype), random_logits(130, seed=2), random_logits(4, 130, seed=1)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    results = []
    for backend in ("triton", "reference"):
        out = rms_norm(*leaves, 1e-6, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, grad.to(dtype))))
        assert [values.dtype for values in results[-1]] == [dtype, dtype, torch.float32]
    torch.testing.assert_close(*results)


def test_more_rows_than_a_block_of_their_sum():
    x, grad, rstd = random_logits(1100, 20), random_logits(1100, 20, seed=1), random_logits(1100, 1, seed=2)
    _, grad_weight = kernels.backward(grad, x, None, rstd, False, True)
    torch.testing.assert_close(grad_weight, (grad.double() * x * rstd).sum(0).float(), rtol=1e-5, atol=1e-4)


def test_no_rows():
    x, weight = torch.zeros(0, 5).requires_grad_(), torch.ones(5).requires_grad_()
    out = rms_norm(x, weight, 1e-6, backend="triton")
    grads = torch.autograd.grad(out, (x, weight), torch.zeros(0, 5))
    assert grads[0].shape == (0, 5)
    assert torch.equal(grads[1], torch.zeros(5))


def test_a_row_looks_at_nothing_but_itself():
    x, grad = random_logits(5, 999), random_logits(5, 999, seed=1)

    def bits(x, grad):
        out, rstd = kernels.forward(x, None, 1e-6)
        return out, rstd, kernels.backward(grad, x, None, rstd, True, False)[0]

    together = bits(strided(x, 13), strided(grad, 5))
    for row in range(5):
        alone = bits(x[row : row + 1], grad[row : row + 1])
        assert all(torch.equal(values[row : row + 1], one) for values, one in zip(together, alone, strict=True))


def test_more_rows_than_a_grid_axis_but_the_first_can_count():
    x = torch.zeros(1, 16).expand(70_000, 16)
    with captured() as launches:
        _, rstd = kernels.forward(x, None, 1e-6)
        kernels.backward(x, x, None, rstd, True, True)
    assert all(len(launch.grid) == 1 for launch in launches)
    # 137 blocks of 512 rows, 8 in a program
    assert [launch.grid[0] for launch in launches] == [70_000, 70_000, 18, 1]


def test_rows_more_than_2_to_the_31_elements_apart():
    """The memory between the rows is never touched, so the system need not provide it."""
    stride = 2**31 + 48
    x = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    x.copy_(random_logits(2, 40, dtype=torch.bfloat16))
    near = x.contiguous()
    out, rstd = kernels.forward(x, None, 1e-6)
    assert torch.equal(out, kernels.forward(near, None, 1e-6)[0])
    far, expected = (kernels.backward(values, values, None, rstd, True, True) for values in (x, near))
    assert all(map(torch.equal, far, expected))


def test_what_torch_gives_a_gpu_in_batch_invariant_mode():
    a = random_logits(5, 16)
    on_gpu = dict(operations("CUDA"))
    out, rstd = on_gpu["_fused_rms_norm"](a, [16], None, 1e-5)
    torch.testing.assert_close(out, F.rms_norm(a, (16,), eps=1e-5))
    grad, _ = on_gpu["_fused_rms_norm_backward"](a, a, [16], rstd, None, [True, False])
    leaf = a.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(F.rms_norm(leaf, (16,), eps=1e-5), leaf, a)[0])
