"""attention on the CPU: allocate, call the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native


def forward(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, causal: bool, scale: float, for_backward: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, Lq, Hq, Dv], stats [B, Lq, Hq, 2] float32 for the backward, else empty)."""
    batch, heads, queries, _ = q.shape
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    stats = torch.empty((batch, queries, heads, 2) if for_backward else 0)
    native().attention(*_arguments(q, k, v, spans, causal, scale, out, stats if for_backward else None))
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
    """(d q, d k, d v) as [B, rows, heads, size], empty where not needed; grad_out [B, Lq, Hq, Dv] is contiguous."""
    grads = [
        torch.empty(
            (x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if needed else (0,), dtype=x.dtype, device=x.device
        )
        for x, needed in zip((q, k, v), needs, strict=True)
    ]
    native().attention_backward(
        *_arguments(q, k, v, spans, causal, scale, out, stats),
        *_strided(grad_out.transpose(1, 2)),
        *(grad.data_ptr() if needed else 0 for grad, needed in zip(grads, needs, strict=True)),
    )
    return tuple(grads)


def _arguments(q, k, v, spans, causal, scale, out, stats) -> tuple:
    batch, heads, queries, size = q.shape
    _, key_heads, keys, value_size = v.shape
    return (
        str(q.dtype),
        spans.data_ptr(),
        len(spans),
        batch,
        queries,
        keys,
        key_heads,
        heads // key_heads,
        size,
        value_size,
        scale,
        causal,
        *_strided(q),
        *_strided(k),
        *_strided(v),
        out.data_ptr(),
        0 if stats is None else stats.data_ptr(),
    )


def _strided(x: Tensor) -> tuple:
    return x.data_ptr(), *x.stride()[:3]
