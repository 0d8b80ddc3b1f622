"""Kernels with one fault each, which the checks in tests/verify must find."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from verify.case import Case
from verify.logits import LogitOperands
from verify.rows import RowKernel

from minirl_kernels.common.triton.config import LaunchConfig


@triton.jit
def copy_kernel(x, out, V, stride, BLOCK: tl.constexpr, EXTRA: tl.constexpr, SHIFT: tl.constexpr):
    """Each program copies one row.

    EXTRA: elements beyond the row's end, or missing ones if negative. SHIFT: distance in rows between the row read and
    the row written.
    """
    i_t = tl.program_id(0)
    o_v = tl.arange(0, BLOCK)
    m_v = o_v < V + EXTRA
    i_from = (i_t + SHIFT) % tl.num_programs(0)
    tl.store(out + i_t * stride + o_v, tl.load(x + i_from * stride + o_v, mask=m_v), mask=m_v)


@triton.jit
def reads_twice_kernel(x, out, V, stride, BLOCK: tl.constexpr):
    o_v = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    m_v = tl.arange(0, BLOCK) < V
    total = tl.sum(tl.load(x + o_v, mask=m_v), 0)
    tl.store(out + o_v, tl.load(x + o_v, mask=m_v) - total, mask=m_v)


@triton.jit
def writes_twice_kernel(x, out, V, stride, BLOCK: tl.constexpr):
    o_v = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    m_v = tl.arange(0, BLOCK) < V
    tl.store(out + o_v, tl.zeros([BLOCK], tl.float32), mask=m_v)
    tl.store(out + o_v, tl.load(x + o_v, mask=m_v), mask=m_v)


@triton.jit
def last_writer_kernel(x, out):
    i_t = tl.program_id(0)
    tl.store(out, tl.load(x + i_t))


@triton.jit
def atomic_kernel(x, out):  # a planted fault, which the ownership check must find
    i_t = tl.program_id(0)
    tl.atomic_add(out, tl.load(x + i_t))


@triton.jit
def halves_kernel(x, out, V, stride, BLOCK: tl.constexpr, BARRIER: tl.constexpr, UPWARDS: tl.constexpr):
    """Writes 16-bit values over the float32 row that they are computed from, in two blocks."""
    i_t = tl.program_id(0)
    for i in tl.static_range(2):
        o_v = (i if UPWARDS else 1 - i) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(x + i_t * stride + o_v, mask=o_v < V)
        if BARRIER:
            tl.debug_barrier()
        tl.store(out + 2 * i_t * stride + o_v, b_x.to(tl.float16), mask=o_v < V)


@triton.jit
def overflowing_kernel(x, out, V, stride, BLOCK: tl.constexpr):
    """Computes offsets in 32 bits, which a long batch overflows. A mask keeps the accesses inside of the tensor."""
    o_v = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    m_v = (tl.arange(0, BLOCK) < V) & (o_v + (2**31 - 1) != 0)
    tl.store(out + o_v, tl.load(x + o_v, mask=m_v), mask=m_v)


@triton.jit
def gluttonous_kernel(x, out, V, BLOCK: tl.constexpr):
    """Uses a tile far too large for its threads, so that registers must spill."""
    o_v = tl.arange(0, BLOCK)
    b_x = tl.load(x + o_v, mask=o_v < V)
    tl.store(out + o_v, tl.exp(b_x - tl.max(b_x, 0)) * b_x, mask=o_v < V)


@triton.jit
def narrow_kernel(x, out, V, BLOCK: tl.constexpr):
    """Accesses every third element, so that neighbouring threads cannot share a wide access."""
    o_v = tl.arange(0, BLOCK)
    tl.store(out + 3 * o_v, tl.load(x + 3 * o_v, mask=o_v < V // 3), mask=o_v < V // 3)


@triton.jit
def sums_row_kernel(x, out, V, stride, BLOCK: tl.constexpr):
    """Has the layout that suits the alignment of x and stride, so that their alignment decides the order of the sum."""
    o_v = tl.arange(0, BLOCK)
    i_t = tl.program_id(0)
    tl.store(out + i_t, tl.sum(tl.load(x + i_t * stride + o_v, mask=o_v < V, other=0.0), 0))


@triton.jit
def sums_columns_kernel(x, out, R, V, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Divides the rows between the threads as it suits the alignment of stride."""
    o_r = tl.arange(0, ROWS)[:, None]
    o_c = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    b_x = tl.load(x + o_r * stride + o_c, mask=(o_r < R) & (o_c < V), other=0.0)
    tl.store(out + o_c, tl.sum(b_x, 0)[None, :], mask=o_c < V)


def _block(rows):
    return triton.next_power_of_2(rows.logits.shape[-1] + 8)


def _copy(extra=0, shift=0, in_place=False):
    def call(rows):
        x = rows.logits
        out = x if in_place else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        grid = (x.shape[0],)
        copy_kernel[grid](x, out, x.shape[1], x.stride(0), BLOCK=_block(rows), EXTRA=extra, SHIFT=shift)
        return (out,)

    return call


def _rowwise(kernel):
    def call(rows):
        x = rows.logits
        out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), BLOCK=_block(rows))
        return (out,)

    return call


def _halves(barrier, upwards):
    def call(rows):
        x = rows.logits
        out = x.view(torch.float16)[:, : x.shape[1]]
        options = {"BLOCK": _block(rows) // 2, "BARRIER": barrier, "UPWARDS": upwards}
        halves_kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), **options)
        return (out,)

    return call


def _sums_row(rows):
    x = rows.logits
    out = torch.empty(len(x))
    sums_row_kernel[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=_block(rows))
    return (out,)


def _sums_row_of_aligned_memory(rows):
    memory = torch.zeros(len(rows.logits), _block(rows))
    memory[:, : rows.logits.shape[1]] = rows.logits
    return _sums_row(replace(rows, logits=memory))


def _sums_columns(rows):
    x = rows.logits
    out = torch.empty(x.shape[1])
    grid = (triton.cdiv(x.shape[1], 64),)
    sums_columns_kernel[grid](x, out, *x.shape, x.stride(0), ROWS=8, COLUMNS=64)
    return (out,)


def _to_one_element(kernel):
    def call(rows):
        out = torch.zeros(1)
        kernel[(len(rows.values),)](rows.values, out)
        return (out,)

    return call


def _one_program(kernel):
    def call(rows):
        out = torch.empty_like(rows.logits[0])
        kernel[(1,)](rows.logits[0], out, len(out), BLOCK=triton.next_power_of_2(len(out)), num_warps=1)
        return (out,)

    return call


CALLS = {
    "sound": _copy(),
    "reads twice": _rowwise(reads_twice_kernel),
    "writes twice": _rowwise(writes_twice_kernel),
    "reads beyond the row": _copy(extra=1),
    "leaves the last element": _copy(extra=-1),
    "reads what others write": _copy(shift=1, in_place=True),
    "all write one element": _to_one_element(last_writer_kernel),
    "atomic": _to_one_element(atomic_kernel),
    "narrows upwards": _halves(barrier=True, upwards=True),
    "overwrites unread halves": _halves(barrier=False, upwards=True),
    "reads what it overwrote": _halves(barrier=True, upwards=False),
    "overflows": _rowwise(overflowing_kernel),
    "sums a row by its alignment": _sums_row,
    "sums a row of aligned memory": _sums_row_of_aligned_memory,
    "sums columns by their number": _sums_columns,
    "gluttonous": _one_program(gluttonous_kernel),
    "narrow": _one_program(narrow_kernel),
}


def faulty_case(name: str, vocab_size: int = 100, *, padding: int = 4) -> Case:
    """A launch of a faulty kernel on rows of float32 with `padding` elements between them."""
    config = LaunchConfig(lanes=8, vec=4, threads=32)
    kernel = RowKernel(name, LogitOperands.make, CALLS[name], lambda vocab_size, dtype: config)
    kernel = replace(kernel, sums_rows=CALLS[name] is _sums_columns)
    return kernel.case(vocab_size, torch.float32, padding=padding)
