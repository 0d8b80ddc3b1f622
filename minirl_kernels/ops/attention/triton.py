"""GPU backend of attention: allocates the results and launches the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.triton.alignment import aligned
from .kernels_backward import backward_kv, backward_q
from .kernels_forward import attend
from .kernels_shared import access


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    key_offsets: Tensor | None,
    causal: bool,
    scale: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, Lq, Hq, Dv], stats [B, Lq, Hq, 2] float32). stats is empty unless `for_backward`."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[3])
    stats = q.new_empty((batch, queries, heads, 2) if for_backward else (0,), dtype=torch.float32)
    rows = _aligned(q, k, v)
    attend(*rows, spans, key_offsets, out, stats if for_backward else None, causal=causal, scale=scale)
    return out, stats


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    key_offsets: Tensor | None,
    out: Tensor,
    stats: Tensor,
    grad_out: Tensor,
    causal: bool,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """Returns (d q, d k, d v), each [B, rows, heads, size], or empty where not needed.

    grad_out: [B, Lq, Hq, Dv], contiguous.
    """
    grads = [_empty_grad(x) if needed else None for x, needed in zip((q, k, v), needs, strict=True)]
    grad_q, grad_k, grad_v = grads
    operands = *_aligned(q, k, v), spans, key_offsets
    grad_out, deltas = aligned(grad_out, 1), stats.new_empty(stats.shape[:3])
    backward_q(*operands, out, stats, grad_out, deltas, grad_q, causal=causal, scale=scale)
    if grad_k is not None or grad_v is not None:
        backward_kv(*operands, stats, grad_out, deltas, grad_k, grad_v, causal=causal, scale=scale)
    return tuple([q.new_empty(0) if grad is None else grad for grad in grads])


def _empty_grad(x: Tensor) -> Tensor:
    batch, heads, rows, size = x.shape
    return x.new_empty(batch, rows, heads, size)


def _aligned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    vec = access(q, v)
    return aligned(q, vec), aligned(k, vec), aligned(v, vec)
