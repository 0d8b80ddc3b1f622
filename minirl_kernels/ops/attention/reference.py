"""Softmax attention over sequences, in eager torch: what is correct."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, causal: bool, scale: float) -> Tensor:
    """out[i] = sum_j e_ij v[j] / sum_j e_ij over the keys that i sees, e_ij = exp(scale (q[i] k[j] - max_j q[i] k[j])).

    Shapes as in attention_over_spans; [B, Lq, Hq, Dv] comes out. In float32 (float64 if the operands are), with one
    rounding to the dtype of v of e for the product with it, and one of the result. Differentiable. A query that sees no
    key gives 0, and so does one that is in no span.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    # 0, and differentiable where there is no sequence too
    out = sum(x[:0].sum() for x in (q, k, v)) + q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    group = q.shape[1] // k.shape[1]
    for batch, first_query, queries, first_key, keys in spans.tolist():
        rows, columns = slice(first_query, first_query + queries), slice(first_key, first_key + keys)
        if queries and keys:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
            if causal:
                seen = seen.tril(keys - queries)
            key, value = (x[batch, :, columns].repeat_interleave(group, 0) for x in (k, v))
            with torch.autocast(q.device.type, enabled=False):
                heads = _attend(q[batch, :, rows].to(dtype), key.to(dtype), value, seen, scale)
            out = out.index_put(
                (torch.tensor(batch), torch.arange(first_query, first_query + queries)), heads.transpose(0, 1)
            )
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[H, queries, Dv] from one sequence, by heads; seen [queries, keys]."""
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    nothing = ~seen.any(-1, keepdim=True)
    # the shift is no part of the maths, and has no gradient; that of a row without keys must be finite
    shift = scores.detach().amax(-1, keepdim=True).masked_fill(nothing, 0.0)
    weights = (scores - shift).exp()
    sums = weights.sum(-1, keepdim=True).masked_fill(nothing, 1.0)
    # rounded in the forward alone: that of a cast would round the gradient by them too, before it cancels
    rounded = weights + (weights.to(v.dtype) - weights).detach()
    return (rounded @ v.to(q.dtype) / sums).to(v.dtype)
