"""The Triton kernel that adds up the results of a token's pairs, and the parts of the gradient of its weights."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common.triton.config import LaunchConfig, make_config
from ...common.triton.launch import Launch, over_rows, prepared
from ...common.triton.numbers import round_to
from ...common.triton.row_tiles import multiple, tile_offsets
from ...common.triton.sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["V", "P"], do_not_specialize_on_alignment=["weights"])
def experts_combine_kernel(
    y,
    weights,
    out,
    parts,
    weights_grad,
    V,
    P,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """out[t] = the sum over k, in order, of weights[t, k] y[t, k]; weights may be None, which means 1.

    weights_grad[t, k] = the sum over P parts, in order. Each of the two results may be None.
    """
    i_t = tl.program_id(0).to(tl.int64)
    if weights_grad is not None:
        o_k = tl.arange(0, K_BLOCK)
        m_k = o_k < tl.where(tl.program_id(1) == 0, K, 0)
        b_grad = tl.zeros([K_BLOCK], tl.float32)
        for i in range(P):
            b_grad += tl.load(parts + (i_t * K + o_k) * P + i, mask=m_k, other=0.0)
        tl.store(weights_grad + i_t * K + o_k, round_to(b_grad, weights_grad.dtype.element_ty), mask=m_k)
    if out is not None:
        V = multiple(V, ALIGN)
        start = tl.program_id(1) * (LANES * VEC)
        o_v = tile_offsets(LANES, VEC)
        m_v = o_v < V - start
        b_sum = tl.zeros([LANES, VEC], tl.float32)
        for k in range(K):
            b_y = tl.load(y + (i_t * K + k) * V + start + o_v, mask=m_v, other=0.0)
            if weights is not None:
                b_sum = tl.fma(b_y, tl.load(weights + i_t * K + k).to(tl.float32), b_sum)
            else:
                b_sum += b_y
        tl.store(out + i_t * V + start + o_v, round_to(b_sum, out.dtype.element_ty), mask=m_v)


def combine(
    y: Tensor | None,
    weights: Tensor | None,
    out: Tensor | None,
    parts: Tensor | None = None,
    weights_grad: Tensor | None = None,
) -> None:
    """Writes out [T, V] from y [T, K, V] float32 and weights [T, K], and weights_grad [T, K] from parts [T, K, P].

    parts: float32, of activation_grad; None leaves weights_grad. y and out may be None too. All are contiguous.
    """
    _combine(y, weights, out, parts, None if parts is None else weights_grad)


@prepared
def _combine(
    y: Tensor | None, weights: Tensor | None, out: Tensor | None, parts: Tensor | None, weights_grad: Tensor | None
) -> Launch:
    summed: Any = y if parts is None else parts
    rows: Any = weights_grad if out is None else out
    tokens, top_k = summed.shape[:2]
    columns = 1 if out is None else out.shape[1]
    config = combine_config(columns, rows.dtype)
    return over_rows(
        experts_combine_kernel,
        (tokens, cdiv(columns, config.tile)),
        columns,
        0 if parts is None else parts.shape[2],
        K=top_k,
        K_BLOCK=next_power_of_2(top_k),
        config=config,
        rows=(rows,),
    )


def combine_config(columns: int, dtype: torch.dtype) -> LaunchConfig:
    """The launch of the combine kernel. Nothing is reduced across threads. Each thread makes one 128-bit store."""
    return make_config(columns, dtype, threads=256, per_thread=16 // dtype.itemsize)
