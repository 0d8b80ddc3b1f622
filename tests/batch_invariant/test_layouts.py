"""Composite operations choose a path by strides and shapes; the bits must not depend on this choice."""

import pytest
import torch
from dtypes import DTYPES
from torch.nn import functional as F

from minirl_kernels import batch_invariant_mode
from minirl_kernels.batch_invariant import audit

pytestmark = pytest.mark.usefixtures("cpu")
B, L, K, N = 6, 7, 192, 40


def cancelling(dtype):
    """(x [B, L, K], w [N, K]) whose products are 0 except for rounding, so that another order changes the bits."""
    gen = torch.Generator().manual_seed(2)
    scales = 2.0 ** torch.randint(-6, 7, (K // 2,), generator=gen)
    x = (torch.randn(B, L, K // 2, generator=gen) * scales).to(dtype)
    w = torch.randn(N, K // 2, generator=gen).to(dtype)
    order = torch.randperm(K, generator=gen)
    return torch.cat([x, x], -1)[..., order], torch.cat([w, -w], -1)[:, order]


LAYOUTS = {
    "every other token": lambda x: x.new_empty(B, 2 * L, K)[:, ::2],
    "some tokens of longer sequences": lambda x: x.new_empty(B, L + 3, K)[:, 2:-1],
    "a slice of features": lambda x: x.new_empty(B, L, K + 5)[..., 3:-2],
    "every other feature": lambda x: x.new_empty(B, L, K, 2)[..., 0],
    "tokens before sequences": lambda x: x.new_empty(L, B, K).transpose(0, 1),
    "features before all": lambda x: x.new_empty(K, B, L).permute(1, 2, 0),
    "one element further": lambda x: x.new_empty(x.numel() + 1)[1:].view(x.shape),
}
# the last token of each sequence, one token, some sequences, every other token of some
PARTS = [
    (slice(None), slice(-1, None)),
    (slice(2, 3), slice(3, 4)),
    (slice(1, 4), slice(None)),
    (slice(1, 5), slice(2, 7, 2)),
]


def heads(x):
    return x.unflatten(-1, (4, K // 4))


def with_bias(x, w):
    """linear with a bias, for products that do not cancel: a bias would hide the small remainder of a cancelled sum."""
    return F.linear(x, w.roll(1, 1), w[:, 0])


# {operation: function of x [B, L, K] and w, computed per token, with the result [B, L, ...]}
COVERED = {
    "linear": lambda x, w: F.linear(x, w),
    "linear with bias": with_bias,
    "linear with bias, a sequence at a time": lambda x, w: torch.stack([with_bias(y, w) for y in x]),
    "linear with bias, a token at a time": lambda x, w: torch.stack([with_bias(y, w) for y in x.unbind(1)], 1),
    "linear with bias, a vector at a time": lambda x, w: torch.stack([with_bias(y, w) for y in x.flatten(0, 1)]).view(
        *x.shape[:2], N
    ),
    "linear with bias of four dimensions": lambda x, w: with_bias(x[:, :, None], w),
    "addmm": lambda x, w: torch.addmm(w[:, 0], x.flatten(0, 1), w.roll(1, 1).T).view(*x.shape[:2], N),
    "matmul": lambda x, w: x @ w.T,
    "matmul by a batch": lambda x, w: x[:, :, None] @ w.T.expand(x.shape[1], K, N),
    "baddbmm": lambda x, w: torch.baddbmm(w[:, 0], x, w.roll(1, 1).T.expand(len(x), K, N)),
    "einsum": lambda x, w: torch.einsum("blk,nk->bln", x, w),
    "einsum of heads": lambda x, w: torch.einsum("blhk,nhk->blhn", heads(x), heads(w)),
    "tensordot": lambda x, w: torch.tensordot(x, w, dims=([2], [1])),
    "inner": lambda x, w: torch.inner(x, w),
    "vecdot": lambda x, w: torch.linalg.vecdot(x, w[0].expand_as(x)),
    "softmax": lambda x, w: x.softmax(-1),
    "softmax over heads": lambda x, w: heads(x).softmax(2),
    "log_softmax": lambda x, w: x.log_softmax(-1),
    "softmin": lambda x, w: F.softmin(x, -1),
    "sum": lambda x, w: (x * w[0].sign()).sum(-1),
    "sum over two dimensions": lambda x, w: heads(x * w[0].sign()).sum((2, 3)),
    "mean": lambda x, w: (x * w[0].sign()).mean(-1),
    "rms_norm": lambda x, w: F.rms_norm(x, (K,), w[0]),
    "layer_norm": lambda x, w: F.layer_norm(x, (K,), w[0], w[1]),
    "cumsum": lambda x, w: x.cumsum(-1),
    "cumsum over heads": lambda x, w: heads(x).cumsum(2),
    "silu": lambda x, w: F.silu(x),
    "gelu": lambda x, w: F.gelu(x),
    "pow": lambda x, w: x.abs() ** 1.7,
    "cross_entropy": lambda x, w: F.cross_entropy(
        x.flatten(0, 1), torch.full((x.shape[0] * x.shape[1],), 3), reduction="none"
    ).view(x.shape[:2]),
    "kl_div": lambda x, w: F.kl_div(x.log_softmax(-1), w[0].softmax(-1).expand_as(x), reduction="none"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COVERED)
def test_no_layout_changes_a_bit(name, dtype):
    function, (x, w) = COVERED[name], cancelling(dtype)
    with batch_invariant_mode():
        with audit() as found:
            whole = function(x, w)
        assert not found.not_covered
        for layout, place in {"contiguous": torch.empty_like, **LAYOUTS}.items():
            y = place(x).copy_(x)
            assert torch.equal(function(y, w), whole), layout
            for part in PARTS:
                assert torch.equal(function(y[part], w), whole[part]), (layout, part)
        same = x[2:3, 3:4].expand(B, L, K)
        assert torch.equal(function(same, w), whole[2:3, 3:4].expand_as(whole)), "expanded"


def test_a_product_rounded_before_its_bias_is_another():
    """Control: without this difference, the tests of linear would prove nothing."""
    x, w = cancelling(torch.bfloat16)
    with batch_invariant_mode():
        assert not torch.equal(with_bias(x, w), x @ w.roll(1, 1).T + w[:, 0])


def test_gradients_of_a_slice_of_hidden_states():
    x, w = cancelling(torch.float32)

    def gradients(x):
        leaves = x, w.clone(), w[:, 0].clone()
        for leaf in leaves:
            leaf.requires_grad_()
        return torch.autograd.grad(F.linear(*leaves).square().sum(), leaves)

    with batch_invariant_mode():
        whole, sliced = gradients(x[:, -1:].contiguous()), gradients(x[:, -1:].detach())
        with torch.inference_mode(), audit() as found:
            F.linear(x[:, -1:], w, w[:, 0])
    assert all(map(torch.equal, whole, sliced))
    assert not found.not_covered
    assert found.covered


# operations that choose a path by strides or shapes, or were not examined; an audit lists them
LISTED = {
    "addbmm": lambda x, w: torch.addbmm(w[:, 0], x, w.T.expand(B, K, N)),
    "_trilinear": lambda x, w: F.bilinear(x[..., :12], x[..., 12:24], w[:, :144].unflatten(1, (12, 12))),
    "convolution": lambda x, w: F.conv1d(x.mT, w[:, :, None]),
    "linalg_vector_norm": lambda x, w: F.normalize(x, dim=-1),
    "logsumexp": lambda x, w: x.logsumexp(-1),
    "native_group_norm": lambda x, w: F.group_norm(x.flatten(0, 1), 4),
    "std": lambda x, w: x.std(-1),
    "glu": lambda x, w: F.glu(x),
    "_scaled_dot_product_flash_attention_for_cpu": lambda x, w: F.scaled_dot_product_attention(
        heads(x), heads(x), heads(x)
    ),
    "_safe_softmax": lambda x, w: torch.ops.aten._scaled_dot_product_attention_math(x, x, x),
    "native_multi_head_attention": lambda x, w: torch.ops.aten._native_multi_head_attention(
        x, x, x, K, 4, x.new_ones(3 * K, K), x.new_ones(3 * K), x.new_ones(K, K), x.new_ones(K)
    ),
    "torch.linalg.multi_dot": lambda x, w: torch.linalg.multi_dot([x[0], w.T, w]),
    "torch.chain_matmul": lambda x, w: torch.chain_matmul(x[0], w.T, w),
}


@pytest.mark.filterwarnings("ignore:.*chain_matmul:FutureWarning", "ignore:.*chain_matmul:UserWarning")
@pytest.mark.parametrize("name", LISTED)
def test_an_audit_lists_what_chooses_its_path(name):
    x, w = cancelling(torch.float32)
    with batch_invariant_mode(), audit() as found:
        LISTED[name](x, w)
    listed = {call.split()[0].removeprefix("aten::").removeprefix("_") for call in found.not_covered}
    assert name.removeprefix("_") in listed


def test_multi_dot_takes_an_order_by_the_number_of_rows():
    """Control: multi_dot needs to be listed only because its order changes."""
    x, w = cancelling(torch.bfloat16)
    with batch_invariant_mode():
        many = x[..., :N].flatten(0, 1)
        rows = [torch.linalg.multi_dot([y, w, w.roll(1, 1).T])[:1] for y in (many.repeat(10, 1), many[:1])]
    assert not torch.equal(*rows)


@pytest.mark.parametrize("available", [True, False])
def test_an_einsum_of_three_chooses_an_order_where_opt_einsum_does(available, monkeypatch):
    monkeypatch.setattr(torch.backends.opt_einsum, "is_available", lambda: available)
    x, w = cancelling(torch.float32)
    with batch_invariant_mode(), audit() as found:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.backends.opt_einsum, "enabled", False)
            torch.einsum("lk,nk,nm->lm", x[0], w, w)
        assert not found.not_covered
        torch.einsum("lk,nk->ln", x[0], w)
        assert not found.not_covered
        if available:
            pytest.importorskip("opt_einsum")
        torch.einsum("lk,nk,nm->lm", x[0], w, w)
    assert bool(found.not_covered) == available
