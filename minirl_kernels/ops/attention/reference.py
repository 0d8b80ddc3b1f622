"""Reference of softmax attention over sequences, in eager torch."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, spans: Tensor, causal: bool, scale: float) -> Tensor:
    """out[i] = sum_j e_ij v[j] / sum_j e_ij over the keys that i sees, e_ij = exp(scale (q[i] k[j] - max_j q[i] k[j])).

    Shapes as in attention_over_spans. Returns [B, Lq, Hq, Dv], differentiable.
    Computed in float32, or in float64 for float64 operands. Two values are rounded to the dtype of v: e before its
    product with v, and the result. A query that sees no key, or is in no span, gives 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    # the empty sums keep the result differentiable where there is no sequence
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
    """Attention of one sequence: [H, queries, Dv]. seen [queries, keys] is True where a query sees a key."""
    scores = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    nothing = ~seen.any(-1, keepdim=True)
    # the shift cancels, so it needs no gradient; a row without keys must have a finite shift
    shift = scores.detach().amax(-1, keepdim=True).masked_fill(nothing, 0.0)
    weights = (scores - shift).exp()
    sums = weights.sum(-1, keepdim=True).masked_fill(nothing, 1.0)
    # the forward alone rounds: a plain cast would also round the gradient by the weights, before its terms cancel
    rounded = weights + (weights.to(v.dtype) - weights).detach()
    return (rounded @ v.to(q.dtype) / sums).to(v.dtype)
