"""CPU backend of attention: allocates the results and calls the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, key_offsets: None, causal: bool, scale: float, for_backward: bool
) -> tuple[Tensor, Tensor]:
    """Returns (out [B, Lq, Hq, Dv], stats [B, Lq, Hq, 2] float32). stats is empty unless `for_backward`."""
    batch, heads, queries, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    stats = torch.empty((batch, queries, heads, 2) if for_backward else (0,), dtype=torch.float32)
    native().attention(q, k, v, spans, out, stats if for_backward else None, causal, scale)
    return out, stats


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    key_offsets: None,
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
        torch.empty(
            (x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if needed else (0,), dtype=x.dtype, device=x.device
        )
        for x, needed in zip((q, k, v), needs, strict=True)
    ]
    outputs = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    native().attention_backward(q, k, v, spans, out, stats, grad_out.transpose(1, 2), *outputs, causal, scale)
    return tuple(grads)
