"""Faults of Triton's interpreter that our kernels work around. A test fails when Triton mends its fault.

The interpreter keeps bfloat16 as raw bits. So `round_to` does the rounding, and a kernel makes every tile float32
before it reduces the tile.
"""

import pytest
import torch
import triton_cases

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl

from minirl_kernels.common.triton.numbers import round_to

pytestmark = triton_cases.interpreter_only()


@triton.jit
def cast_kernel(x, plain, rounded, N: tl.constexpr):
    o = tl.arange(0, N)
    b_x = tl.load(x + o)
    tl.store(plain + o, b_x.to(tl.bfloat16))
    tl.store(rounded + o, round_to(b_x, tl.bfloat16))


@triton.jit
def sum_kernel(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def dot_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_x = tl.load(x + o)
    tl.store(out + o, tl.dot(b_x, b_x))


def test_a_cast_to_bfloat16_truncates():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([1.99999, -1.99999, float("inf"), float("nan")])
    plain, rounded = torch.empty(2, 4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, plain, rounded, N=4096)
    truncated = (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert torch.equal(plain[:3], truncated[:3])
    assert torch.equal(plain[4:], truncated[4:])
    torch.testing.assert_close(rounded, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_sum_of_bfloat16_adds_bits():
    """https://github.com/triton-lang/triton/issues/11604"""
    out = torch.empty(1, dtype=torch.bfloat16)
    sum_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), out, N=16)
    assert out.item() != 16


def test_a_dot_of_bfloat16_multiplies_bits():
    """https://github.com/triton-lang/triton/issues/11584"""
    out = torch.empty(16, 16)
    dot_kernel[(1,)](torch.eye(16, dtype=torch.bfloat16), out, N=16)
    assert not torch.equal(out, torch.eye(16))
