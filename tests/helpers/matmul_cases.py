"""Checks of matmul, linear and bmm for the CPU, Triton's interpreter and a GPU."""

from __future__ import annotations

import torch
from policy_batches import assert_as_exact_as_eager

from minirl_kernels import bmm, linear, matmul
from minirl_kernels.ops.matmul.reference import linear_reference, matmul_reference

TURNS = [(a, b) for a in (False, True) for b in (False, True)]


def matrix(*shape, dtype=torch.float32, turned=False, seed=0, device="cpu"):
    """[..., rows, columns], contiguous along the rows or, if turned, along the columns."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)
    return x.mT.contiguous().mT if turned else x


def cancelling(rows, columns, depth, dtype, *, seed=0, device="cpu"):
    """x [rows, depth] and weight [columns, depth], whose exact products are 0.

    Nearly every element of the computed product shows any other order of its sum.
    """
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(size, depth // 2, generator=generator) for size in (rows, columns))
    order = torch.randperm(depth // 2 * 2, generator=generator)
    pair = torch.cat([x, x], 1)[:, order], torch.cat([w, -w], 1)[:, order]
    return [values.to(dtype).to(device) for values in pair]


def check_values_and_gradients(function, reference, operands):
    """Values, gradients and their gradients are as exact as `reference` in the same dtype, against float64.

    function and reference take the operands. The gradient of the result is random, the same for all.
    """

    def run(call, tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = call(*leaves)
        generator = torch.Generator().manual_seed(9)
        upstream = torch.randn(out.shape, generator=generator).to(out)
        upstream.requires_grad_()
        grads = torch.autograd.grad(out, leaves, upstream, create_graph=True)
        second = torch.autograd.grad(grads[0].sum(), [upstream, leaves[1]])
        return [values.detach().cpu() for values in (out, *grads, *second)]

    ours, eager = run(function, operands), run(reference, operands)
    exact = run(reference, [tensor.double() for tensor in operands])
    for values, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_exact_as_eager(values, theirs, truth)


def check_matmul(sizes, dtype, backend, device="cpu"):
    m, n, k = sizes
    for a_turned, b_turned in TURNS:
        a = matrix(m, k, dtype=dtype, turned=a_turned, device=device)
        b = matrix(k, n, dtype=dtype, turned=b_turned, seed=1, device=device)
        check_values_and_gradients(lambda a, b: matmul(a, b, backend=backend), matmul_reference, (a, b))


def check_bmm(sizes, dtype, backend, device="cpu"):
    batch, m, n, k = sizes
    for a_turned, b_turned in TURNS:
        a = matrix(batch, m, k, dtype=dtype, turned=a_turned, device=device)
        b = matrix(batch, k, n, dtype=dtype, turned=b_turned, seed=1, device=device)
        check_values_and_gradients(lambda a, b: bmm(a, b, backend=backend), matmul_reference, (a, b))


def check_linear(outer, sizes, dtype, backend, device="cpu"):
    n, k = sizes
    operands = [
        matrix(*shape, dtype=dtype, seed=seed, device=device) for seed, shape in enumerate([(*outer, k), (n, k)])
    ]
    bias = matrix(n, dtype=dtype, seed=2, device=device)
    check_values_and_gradients(lambda *x: linear(*x, backend=backend), linear_reference, (*operands, bias))
    check_values_and_gradients(
        lambda x, w: linear(x, w, backend=backend), lambda x, w: linear_reference(x, w, None), operands
    )


def check_a_row_in_any_batch_and_place(sizes, dtype, backend, counts, device="cpu"):
    """A row of x W^T, x W^T + bias and d x has the same bits alone, among others, elsewhere and in another product."""
    rows, columns, depth = sizes
    x, weight = cancelling(rows, columns, depth, dtype, device=device)
    bias = weight[:, 0].contiguous()

    def bits(x):
        leaf = x.detach().requires_grad_()
        out = linear(leaf, weight, bias, backend=backend)
        # the sums of d x have terms of both signs, so that they show another order too
        upstream = linear(x, weight.flip(0), backend=backend)
        return out.detach(), linear(x, weight, backend=backend), *torch.autograd.grad(out, leaf, upstream)

    together = bits(x)
    for count in counts:
        first = (7 * count) % (rows - count + 1)
        for ours, theirs in zip(bits(x[first : first + count]), together, strict=True):
            assert torch.equal(ours, theirs[first : first + count]), (first, count)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)).to(device)
    for ours, theirs in zip(bits(x[order]), together, strict=True):
        assert torch.equal(ours, theirs[order])
    plain = together[1]
    for x_turned, weight_turned in TURNS:
        a = x.T.contiguous().T if x_turned else x
        b = weight.T if weight_turned else weight.T.contiguous()
        assert torch.equal(matmul(a, b, backend=backend), plain)
        assert torch.equal(matmul(b.T, a.T, backend=backend), plain.T)
        assert torch.equal(matmul(a[:, : 2 * depth], b[:, columns // 3 :], backend=backend), plain[:, columns // 3 :])
        batch = bmm(a.expand(3, -1, -1), torch.stack([b, b.flip(1), b]), backend=backend)
        assert torch.equal(batch[0], plain)
        assert torch.equal(batch[2], plain)
        assert torch.equal(batch[1], plain.flip(1))
