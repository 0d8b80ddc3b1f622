"""attention: batch-invariant softmax attention of packed sequences, causal or full, with grouped queries.

With S = scale q k^T over the keys that a query sees, and P = softmax(S):
    out = P v
    d v = P^T d out,  d S = P (d out v^T - rowsum(d out * out)),  d q = scale d S k,  d k = scale d S^T q
Sums are float32. A query reads its keys in blocks of a fixed size, from the first key of its sequence on. The method is
online softmax (Milakov and Gimelshein, arXiv 1805.02867). The bits of a query's result do not depend on the number of
queries, later keys, other sequences, or the place in memory. A token decoded from a cache of keys has the same bits as
in the whole sequence.

The weights of a block are relative to the largest score so far. They are rounded to the dtype of v before the product
with v, and their sum is computed before that rounding. The backward rounds P and d S in the same way.
The forward keeps two numbers of each row for the backward: the largest score and the sum. Their logsumexp alone would
lose digits where the scores are far from 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...common.checks import FLOAT_DTYPES, INDEX_DTYPES, check_device, check_tensor
from ...common.library import Op, register
from .reference import attention_reference

OP = Op(__package__)
MAX_SIZE = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each packed sequence over its own keys.

    q: [Tq, Hq, D]; float32, bfloat16 or float16, last dimension contiguous, D from 1 to 256.
    k: [Tk, Hkv, D], of the dtype of q, last dimension contiguous. Hq must be a multiple of Hkv: each head of k serves
        Hq / Hkv consecutive heads of q.
    v: [Tk, Hkv, Dv], of the dtype of q, last dimension contiguous, Dv from 1 to 256. Autocast casts q, k and v.
    cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1]; the first row of each sequence in q and in k, then the number
        of rows.
    causal: if True, query i of a sequence sees the keys j <= i + (its keys) - (its queries): the ends are aligned.
        A query that sees no key gives 0 and has no gradient.
    scale: factor of the scores, above 0; None means 1 / sqrt(D).
    Returns [Tq, Hq, Dv] of the dtype of q, differentiable by q, k and v.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    The bits of a query's result and of its gradient depend on neither the rest of the batch nor the number of threads.
    The gradients by k and v are sums over the queries of the same sequence, in a fixed order.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [T, heads, size]")
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, offsets)
        if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype not in INDEX_DTYPES:
            raise ValueError(
                f"{name} has shape {tuple(offsets.shape)} and dtype {offsets.dtype}: it must be int64 or int32 [B + 1]"
            )
        check_device(name, offsets, q.device)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}: it must be the shape of cu_seqlens_q, "
            f"{tuple(cu_seqlens_q.shape)}"
        )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # the backward of an index copies, the backward of squeeze does not
    return _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale, backend).squeeze(0)


def attention_over_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of sequences anywhere in a batch: padded on either side, packed, or in a cache of keys.

    q: [B, Hq, Lq, D], with any outer strides; dtype and D as in attention.
    k: [B, Hkv, Lk, D], with any outer strides.
    v: [B, Hkv, Lk, Dv], with any outer strides.
    spans: int64 [N, 5], contiguous. A row describes one sequence: its batch entry, its first row of q, its number of
        queries, its first row of k and v, its number of keys. Two spans must not share a row, and they must be in the
        order of their rows, in q and in k. Rows outside all spans are not read. On a GPU, other spans fail an assertion
        on the device.
    causal, scale: as in attention.
    Returns [B, Lq, Hq, Dv], contiguous; rows outside all spans are 0.
    Raises the same errors as attention.
    """
    check_tensor("spans", spans)
    if spans.dtype != torch.int64 or spans.dim() != 2 or spans.shape[1] != 5 or not spans.is_contiguous():
        raise ValueError(
            f"spans has shape {tuple(spans.shape)} and dtype {spans.dtype}: it must be int64 [N, 5], contiguous"
        )
    check_device("spans", spans, q.device)
    return _attention(q, k, v, spans, None, causal, scale, backend)


def _attention(q, k, v, spans, key_offsets, causal, scale, backend) -> Tensor:
    """spans: [N, 5]; or [N + 1], the offsets of the queries, with key_offsets [N + 1]."""
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) for x in (q, k, v))
    _check_operands(q, k, v)
    scale = _checked_scale(scale, q.shape[3])
    backend = OP.resolve(backend, q.device)
    if backend == "triton":
        # the kernels read offsets as they are
        spans, key_offsets = spans.contiguous(), None if key_offsets is None else key_offsets.contiguous()
    elif key_offsets is not None:
        spans, key_offsets = _packed_spans(spans, key_offsets, q.shape[2], k.shape[2]), None
    if backend == "reference":
        return attention_reference(q, k, v, spans, causal, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(q, k, v, spans, key_offsets, causal, scale, backend)
    return attention_forward(q, k, v, spans, key_offsets, causal, scale, False, backend)[0]


def _check_operands(q, k, v) -> None:
    q_dtype, device = q.dtype, q.device
    for name, x in (("q", q), ("k", k), ("v", v)):
        dtype, shape = x.dtype, x.shape
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} has dtype {dtype}: it must be float32, bfloat16 or float16")
        if dtype != q_dtype:
            raise TypeError(f"{name} has dtype {dtype}: it must be the dtype of q, {q_dtype}")
        check_device(name, x, device)
        if len(shape) != 4 or not 0 < shape[3] <= MAX_SIZE or shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(shape)}: it must have heads, and as its last dimension a size of 1 to "
                f"{MAX_SIZE}"
            )
        if shape[3] > 1 and x.stride(3) != 1:
            raise ValueError(
                f"{name} has strides {tuple(x.stride())}: its last dimension must be contiguous (stride 1)"
            )
    (batch, heads, _, size), (key_batch, key_heads, keys, key_size) = q.shape, k.shape
    if key_batch != batch or key_size != size:
        raise ValueError(f"k has shape {tuple(k.shape)}: its batch and its last dimension must be {batch} and {size}")
    if heads % key_heads:
        raise ValueError(f"k has {key_heads} heads: the {heads} of q must be a multiple of them")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must have the heads and rows of k, {key_heads} and {keys}")


def _checked_scale(scale, size: int) -> float:
    if scale is None:
        return size**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {scale!r}: it must be a number")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}: it must be above 0 and finite")
    return float(scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, spans, key_offsets, causal, scale, backend):
        out, stats = attention_forward(q, k, v, spans, key_offsets, causal, scale, True, backend)
        ctx.save_for_backward(q, k, v, spans, key_offsets, out, stats)
        ctx.options = (causal, scale)
        ctx.backend = backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        needs = ctx.needs_input_grad[:3]
        grads = attention_backward(*ctx.saved_tensors, grad_out.contiguous(), *ctx.options, *needs, ctx.backend)
        grads = [grad.transpose(1, 2) if needed else None for grad, needed in zip(grads, needs, strict=True)]
        return *grads, None, None, None, None, None


def _spans(cu_seqlens_q, cu_seqlens_k, queries, keys):
    columns = [torch.zeros_like(cu_seqlens_q[1:], dtype=torch.int64)]
    for name, offsets, size in (("cu_seqlens_q", cu_seqlens_q, queries), ("cu_seqlens_k", cu_seqlens_k, keys)):
        counts = offsets.diff()
        if not ((counts >= 0).all() & (offsets[0] == 0) & (offsets[-1] == size)):
            raise ValueError(
                f"{name} is {offsets.tolist()[:8]}…: it must start at 0, never fall, and end at the number of rows, "
                f"{size}"
            )
        columns += [offsets[:-1], counts]
    return torch.stack([column.long() for column in columns], 1)


def _forward(kernels, q, k, v, spans, key_offsets, causal, scale, for_backward):
    return kernels.forward(q, k, v, spans, key_offsets, causal, scale, for_backward)


def _forward_fake(q, k, v, spans, key_offsets, causal, scale, for_backward, backend):
    batch, heads, queries, _ = q.shape
    stats_shape = (batch, queries, heads, 2) if for_backward else (0,)
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(stats_shape, dtype=torch.float32)


def _backward(kernels, q, k, v, spans, key_offsets, out, stats, grad_out, causal, scale, needs_q, needs_k, needs_v):
    needs = (needs_q, needs_k, needs_v)
    return kernels.backward(q, k, v, spans, key_offsets, out, stats, grad_out, causal, scale, needs)


def _backward_fake(
    q, k, v, spans, key_offsets, out, stats, grad_out, causal, scale, needs_q, needs_k, needs_v, backend
):
    return tuple(
        x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]) if needed else (0,))
        for x, needed in ((q, needs_q), (k, needs_k), (v, needs_v))
    )


# a registered op, because torch.compile cannot trace the branch; the host waits for the device
_packed_spans = register(
    "attention_spans(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt queries, SymInt keys) -> Tensor",
    _spans,
    lambda cu_seqlens_q, *_: cu_seqlens_q.new_empty((cu_seqlens_q.shape[0] - 1, 5), dtype=torch.int64),
    waits=True,
)
_OPERANDS = "Tensor q, Tensor k, Tensor v, Tensor spans, Tensor? key_offsets"
attention_forward = OP.define(
    f"attention({_OPERANDS}, bool causal, float scale, bool for_backward, str backend) -> (Tensor out, Tensor stats)",
    _forward,
    _forward_fake,
)
attention_backward = OP.define(
    f"attention_backward({_OPERANDS}, Tensor out, Tensor stats, Tensor grad_out, bool causal, float scale, "
    "bool needs_q, bool needs_k, bool needs_v, str backend) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward,
    _backward_fake,
)
