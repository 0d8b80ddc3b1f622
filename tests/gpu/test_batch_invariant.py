"""The mode on a GPU: the operations that it overrides have the same bits in any batch, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from minirl_kernels import batch_invariant_mode
from minirl_kernels.batch_invariant import audit
from minirl_kernels.batch_invariant.known import INVARIANT, INVARIANT_ON_GPU

K, N = 1536, 96
ROWWISE = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with bias": lambda x, w: F.linear(x, w, w[:, 0]),
    "bmm": lambda x, w: torch.bmm(x.unsqueeze(1), w.T.expand(len(x), K, N)),
    "softmax": lambda x, w: F.linear(x, w).mul(1e4).softmax(-1),
    "log_softmax": lambda x, w: F.linear(x, w).mul(1e4).log_softmax(-1, dtype=torch.float32),
    "mean": lambda x, w: (x * w[0].sign()).mean(-1),
    "sum": lambda x, w: (x * w[0].sign()).sum(-1),
    "rms_norm": lambda x, w: F.rms_norm(x, (K,), w[0], 1e-6),
}


def cancelling(rows, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(size, K // 2, device="cuda", generator=generator).to(dtype) for size in (rows, N))
    order = torch.randperm(K, device="cuda", generator=generator)
    return torch.cat([x, x], 1)[:, order].requires_grad_(), torch.cat([w, -w], 1)[:, order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROWWISE)
def test_a_row_has_the_same_bits_in_any_batch(name, dtype):
    x, w = cancelling(300, dtype)

    def run(part):
        rows = x[part].detach().requires_grad_()
        out = ROWWISE[name](rows, w)
        # a gradient 8 times as large overflows float16
        values = out.detach(), torch.autograd.grad(out, rows, out.detach() / 8)[0]
        assert all(x.isfinite().all() for x in values)  # NaN does not equal itself
        return values

    with batch_invariant_mode(), audit() as found:
        whole = run(slice(None))
        for part in (slice(0, 1), slice(17, 20), slice(100, 229), slice(299, 300)):
            assert all(torch.equal(values, of_all[part]) for values, of_all in zip(run(part), whole, strict=True))
    assert found.covered
    assert not found.not_covered


POINTWISE = {
    "add": lambda x, y: torch.add(x, y, alpha=0.3),
    "atan2": torch.atan2,
    "atanh": lambda x, y: (0.9 * x.sin()).atanh(),
    "celu": lambda x, y: F.celu(x),
    "cosh": lambda x, y: x.cosh(),
    "elu": lambda x, y: F.elu(x),
    "elu_backward": lambda x, y: torch.ops.aten.elu_backward(x, 1.0, 1.0, 1.0, False, y),
    "exp2": lambda x, y: x.exp2(),
    "floor_divide": torch.floor_divide,
    "gelu": lambda x, y: F.gelu(x, approximate="tanh"),
    "gelu_backward": lambda x, y: torch.ops.aten.gelu_backward(x, y),
    "logaddexp": lambda x, y: torch.logaddexp(x.float(), y.float()),
    "logaddexp2": lambda x, y: torch.logaddexp2(x.float(), y.float()),
    "logit": lambda x, y: x.sigmoid().logit(1e-3),
    "mish": lambda x, y: F.mish(x),
    "mish_backward": lambda x, y: torch.ops.aten.mish_backward(x, y),
    "pow": lambda x, y: (x.abs() + 0.1).pow(0.3),
    "rsqrt": lambda x, y: (x.abs() + 0.1).rsqrt(),
    "rsub": lambda x, y: torch.rsub(x, y, alpha=0.3),
    "selu": lambda x, y: F.selu(x),
    "sigmoid": lambda x, y: x.sigmoid(),
    "silu": lambda x, y: F.silu(x),
    "silu_backward": lambda x, y: torch.ops.aten.silu_backward(x, y),
    "sinh": lambda x, y: x.sinh(),
    "softplus": lambda x, y: F.softplus(x),
    "softplus_backward": lambda x, y: torch.ops.aten.softplus_backward(x, y, 1.0, 20.0),
    "sub": lambda x, y: torch.sub(x, y, alpha=0.3),
}


def test_every_pointwise_claim_has_a_test():
    listed = INVARIANT_ON_GPU - INVARIANT
    assert {name.removeprefix("aten::") for name in listed} == POINTWISE.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_an_element_has_the_same_bits_anywhere(name, dtype):
    """In short tensors, at odd addresses, with strides, and in the incomplete last part of a tensor."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (3 * torch.randn(5003, device="cuda", generator=generator).to(dtype) for _ in range(2))
    function = POINTWISE[name]
    whole = function(x, y)
    for length in (1, 7, 129, 1024):
        for start in (0, 1, 3, 5003 - length):
            part = slice(start, start + length)
            assert torch.equal(function(x[part], y[part]), whole[part])
            assert torch.equal(function(x[part].clone(), y[part].clone()), whole[part])
    assert torch.equal(function(x[::2], y[::2]), whole[::2])
    assert torch.equal(function(x[1:].view(2, 2501).T, y[1:].view(2, 2501).T), whole[1:].view(2, 2501).T)
