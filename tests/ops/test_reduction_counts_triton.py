"""How many kernels one call of mean, sum, rms_norm and softmax launches on a GPU, forward and backward."""

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from triton_cases import random_logits

pytest.importorskip("triton", reason="triton is not installed")

from kernel_counts import kernels

import minirl_kernels as mk

pytestmark = triton_cases.interpreter_only()


def forward_and_backward(call, *leaves):
    """The kernels of either, for a result with an upstream gradient of its own memory."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found = []

    def forward():
        found.append(call(*leaves))

    first = kernels(forward)
    grad = torch.ones_like(found[0], memory_format=torch.contiguous_format)
    return first, kernels(lambda: torch.autograd.grad(found[0], leaves, grad))


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("of", DTYPES, ids=str)
def test_a_sum_is_one_kernel_for_each_stage(of, to):
    """Of any dtype into any dtype. The gradient of a sum has at most a cast."""
    for shape, dim, stages in (((3, 40), -1, 1), ((40, 3), 0, 1), ((130, 3), 0, 2), ((2, 130, 3), 1, 2)):
        kernel = "mean_rows_kernel" if dim == -1 else "mean_columns_kernel"
        forward, backward = forward_and_backward(
            lambda x, dim=dim: mk.sum(x, dim, dtype=to, backend="triton"), random_logits(*shape, dtype=of)
        )
        assert forward == [kernel] * stages
        assert backward == ["aten::_to_copy"] * (of != to)


@pytest.mark.parametrize("dim", [0, 1, 2, (0, 2), None])
def test_a_mean_of_any_layout(dim):
    """A copy at most, if no view has rows or columns of one stride; the gradient is a quotient."""
    x = random_logits(4, 5, 6).transpose(0, 2)
    forward, backward = forward_and_backward(lambda x: mk.mean(x, dim, backend="triton"), x)
    assert len(forward) <= 2
    assert backward == ["aten::div"]


@pytest.mark.parametrize(
    ("rows", "dtype"), [(3, torch.float32), (3, torch.bfloat16), (3, torch.float16), (129, torch.bfloat16)], ids=str
)
def test_rms_norm(rows, dtype):
    """d weight has the dtype of the weight without a cast."""
    for of_weight in (dtype, torch.float32):
        forward, backward = forward_and_backward(
            lambda x, weight: mk.rms_norm(x, weight, 1e-6, backend="triton"),
            random_logits(rows, 16, dtype=dtype),
            random_logits(16, dtype=of_weight),
        )
        assert forward == ["rms_norm_fwd_kernel"]
        assert backward == ["rms_norm_bwd_kernel", "rms_norm_weight_kernel", "mean_columns_kernel"]


@pytest.mark.parametrize("call", [mk.softmax, mk.log_softmax], ids=["softmax", "log_softmax"])
def test_softmax(call):
    forward, backward = forward_and_backward(lambda x: call(x, -1, backend="triton"), random_logits(5, 16))
    assert (forward, backward) == (["softmax_fwd_kernel"], ["softmax_bwd_kernel"])
    # along another dimension, each operand is copied once, and so is the result of the forward
    forward, backward = forward_and_backward(lambda x: call(x, 0, backend="triton"), random_logits(5, 16))
    assert len(forward) == 3
    assert len(backward) == 3
