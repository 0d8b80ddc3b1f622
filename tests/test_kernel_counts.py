"""The counting of kernels and waits that other tests rely on."""

import pytest
import torch
import triton_cases
from kernel_counts import count_kernels, kernels, waits

from minirl_kernels import linear, rms_norm, token_logprobs

pytestmark = triton_cases.interpreter_only()


def test_kernels_of_the_forward_and_the_backward():
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)

    def run():
        out = rms_norm(x, weight, 1e-6, backend="triton")
        return torch.autograd.grad(out * 2, (x, weight), torch.ones(6, 32))

    launched = kernels(run)
    assert launched[:2] == ["rms_norm_fwd_kernel", "aten::mul"]
    assert launched.index("rms_norm_bwd_kernel") > launched.index("aten::ones")
    assert "rms_norm_weight_kernel" in launched
    assert count_kernels(run) == len(launched)


def test_results_are_those_of_an_uncounted_call():
    x, weight = torch.randn(5, 32), torch.randn(7, 32)
    results = []
    kernels(lambda: results.append(linear(x, weight, backend="triton")))
    assert torch.equal(results[0], linear(x, weight, backend="triton"))


def test_views_new_memory_and_empty_results_are_no_kernels():
    x = torch.randn(4, 6)
    assert kernels(lambda: (x.T[1:].unsqueeze(0).detach(), x.new_empty(3), torch.empty_like(x))) == []
    assert kernels(lambda: x[:0] + 1) == []
    assert kernels(lambda: x.new_zeros(3)) == ["aten::new_zeros"]
    assert kernels(lambda: x.T.contiguous()) == ["aten::clone"]
    assert kernels(lambda: x.bfloat16()) == ["aten::_to_copy"]


def test_operations_that_torch_composes_are_counted_by_their_parts():
    x, weight = torch.randn(5, 32), torch.randn(7, 32)

    def run():
        return torch.nn.functional.linear(x, weight)

    assert kernels(run) == ["aten::mm"]
    with torch.inference_mode():
        assert kernels(run) == ["aten::mm"]


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (lambda x: float(x.sum()), ["aten::_local_scalar_dense"]),
        (lambda x: bool((x > 0).any()), ["aten::_local_scalar_dense"]),
        (lambda x: x[x > 0], ["aten::index"]),
        (lambda x: (x > 0).nonzero(), ["aten::nonzero"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: x.repeat_interleave(torch.arange(3)), ["aten::repeat_interleave"]),
        (lambda x: x.repeat_interleave(torch.arange(3), output_size=3), []),
        (lambda x: x.where(x > 0, 0).sum(), []),
    ],
)
def test_waits(run, found):
    assert waits(lambda: run(torch.randn(3))) == found


def test_waits_of_the_backward():
    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad if grad.sum().item() else grad * 0

    x = torch.randn(3, requires_grad=True)
    assert waits(lambda: Waits.apply(x).sum().backward()) == ["aten::_local_scalar_dense"]


def test_an_op_that_waits_inside():
    logits = torch.randn(3, 16)
    ids = torch.tensor([1, 2, -100])
    assert not waits(lambda: token_logprobs(logits, ids, backend="triton"))
    assert waits(lambda: token_logprobs(logits, ids, check=True, backend="triton"))
