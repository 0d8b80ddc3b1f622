"""The mode on a GPU: the operations that it overrides have the same bits in any batch, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from minirl_kernels import batch_invariant_mode
from minirl_kernels.batch_invariant import audit

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
        return out.detach(), torch.autograd.grad(out, rows, out.detach())[0]

    with batch_invariant_mode(), audit() as found:
        whole = run(slice(None))
        for part in (slice(0, 1), slice(17, 20), slice(100, 229), slice(299, 300)):
            assert all(torch.equal(values, of_all[part]) for values, of_all in zip(run(part), whole, strict=True))
    assert found.covered
    assert not found.not_covered
