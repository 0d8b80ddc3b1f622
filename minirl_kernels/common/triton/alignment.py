"""Operands at addresses that allow 128-bit accesses.

The compiler chooses the order of a sum by the alignment of its operands. Where the sizes of an operand allow 128-bit
accesses and its addresses do not, a launcher copies it. The order is then a function of the sizes and dtype alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_aligned(x: Tensor, vec: int) -> bool:
    """Whether every row of x [..., V] begins and ends at a multiple of 128 bits, which are `vec` elements or fewer."""
    if x.data_ptr() % 16 or x.shape[-1] % vec:
        return False
    if x.is_contiguous() or math.gcd(*x.stride()[:-1]) % vec == 0:
        return True
    return all(stride % vec == 0 for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)


def aligned(x: Tensor, vec: int) -> Tensor:
    """x, or its copy in aligned memory if the size of its rows allows 128-bit accesses and their addresses do not.

    vec: number of elements of an access of the narrowest dtype. With 1 only the address of the whole tensor counts.
    """
    whole = x.is_contiguous() and x.data_ptr() % 16 == 0  # the common case first: it takes half the time
    if whole or x.shape[-1] % vec or is_aligned(x, vec):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def memory_for(out: Tensor, vec: int) -> Tensor:
    """Memory for a kernel that writes `out`: `out` itself, or aligned memory where `aligned` would copy.

    The caller copies such memory to `out` after the launch.
    """
    if out.shape[-1] % vec or is_aligned(out, vec):
        return out
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def aligned_vector(x: Tensor | None) -> Tensor | None:
    """x [V] as contiguous memory at an aligned address, because a kernel is specialised to this alignment."""
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)
