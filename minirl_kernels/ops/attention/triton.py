"""GPU backend of attention: allocates the results and launches the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels_backward import backward_kv, backward_q
from .kernels_forward import attend


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, causal: bool, scale: float, for_backward: bool
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, Lq, Hq, Dv], stats [B, Lq, Hq, 2] float32). stats is empty unless `for_backward`."""
    batch, heads, queries, _ = q.shape
    out = q.new_zeros(batch, queries, heads, v.shape[3])  # rows outside all spans stay 0
    stats = q.new_zeros((batch, queries, heads, 2) if for_backward else (0,), dtype=torch.float32)
    attend(q, k, v, spans, causal, scale, out, stats if for_backward else None)
    return out, stats


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
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
    grads = [
        x.new_zeros((x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if needed else (0,))
        for x, needed in zip((q, k, v), needs, strict=True)
    ]
    grad_q, grad_k, grad_v = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    deltas = backward_q(q, k, v, spans, out, stats, grad_out, causal, scale, grad_q)
    if grad_k is not None or grad_v is not None:
        backward_kv(q, k, v, spans, stats, grad_out, deltas, causal, scale, grad_k, grad_v)
    return tuple(grads)
