"""Roundings, products and functions that give equal results on a GPU and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# the initial maximum; it is finite, so that a row that begins with -inf does not compute inf - inf
LOWEST = tl.constexpr(-3.4028234663852886e38)
# 2**-160 is 0 in float32, and 0 * -160 is 0 where 0 * -inf would be NaN
LOWEST_EXPONENT = tl.constexpr(-160.0)
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """float32 rounded to `dtype`, to nearest with ties to even. The interpreter's own cast truncates to bfloat16."""
    if INTERPRETING and dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & 0xFFFF0000
        b_x = tl.where(b_x == b_x, b_bits.to(tl.float32, bitcast=True), b_x)
    return b_x.to(dtype)


@triton.jit
def dot(b_a, b_b, b_sum):
    """b_sum + b_a b_b, in float32 without TF32. The interpreter's own dot does not understand bfloat16."""
    if INTERPRETING:
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def tanh(b_x):
    """tanh: below |x| = 0.64 an odd least-squares polynomial (relative error 6e-9), above 1 - 2 / (e^2|x| + 1)."""
    b_z = b_x * b_x
    b_p = b_z * -5.59025e-3 + 2.053771e-2
    b_p = b_z * b_p - 5.37091e-2
    b_p = b_z * b_p + 0.13331081
    b_p = b_z * b_p - 0.33333269
    b_e = tl.exp2(exponent(tl.abs(b_x), -2 * LOG2E))
    b_large = (1 - b_e) / (1 + b_e)
    return tl.where(tl.abs(b_x) < 0.64, b_x + b_x * b_z * b_p, tl.where(b_x < 0, -b_large, b_large))


@triton.jit
def exponent(b_x, c):
    """b_x * c for exp2, and at least LOWEST_EXPONENT. NaN stays NaN."""
    return tl.maximum(b_x * c, LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
