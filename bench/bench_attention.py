"""attention beside torch's: whole sequences, forward and with backward, and decoding one token from a cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import Contender, Inputs
from torch import Tensor
from torch.nn import functional as F

from minirl_kernels.ops.attention import attention_over_spans

OURS, SDPA, EAGER = "attention", "torch, scaled_dot_product_attention", "torch, eager"
HEADS = {"heads": 16, "key_heads": 8, "size": 128}


@dataclass
class Sequences(Inputs):
    """Queries by token, keys and values by head, as a model and its cache lay them out."""

    q: Tensor  # [B, Hq, L, D], as k and v requires grad
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor
    spans: Tensor
    grad_out: Tensor  # [B, L, Hq, D]


def sequences(tokens, length, keys, heads, key_heads, size, *, dtype, device) -> Sequences:
    """`tokens` queries; each sequence has `keys` keys, and its last `length` tokens are queries."""
    generator = torch.Generator(device).manual_seed(0)
    batch = tokens // length

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator).to(dtype)

    span = torch.tensor([0, 0, length, 0, keys], device=device).repeat(batch, 1)
    span[:, 0] = torch.arange(batch)
    return Sequences(
        q=normal(batch, length, heads, size).transpose(1, 2).requires_grad_(),
        k=normal(batch, key_heads, keys, size).requires_grad_(),
        v=normal(batch, key_heads, keys, size).requires_grad_(),
        spans=span,
        grad_out=normal(batch, length, heads, size),
    )


def _ours(batch):
    return attention_over_spans(batch.q, batch.k, batch.v, batch.spans)


def _sdpa(batch):
    causal = batch.q.shape[2] > 1
    out = F.scaled_dot_product_attention(batch.q, batch.k, batch.v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _eager(batch):
    """As transformers computes it."""
    k, v = (x.repeat_interleave(batch.q.shape[1] // x.shape[1], 1) for x in (batch.k, batch.v))
    scores = batch.q @ k.mT * batch.q.shape[3] ** -0.5
    queries, keys = scores.shape[2:]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2).contiguous()


def forward(function, batch):
    with torch.no_grad():
        return {"out": function(batch)}


def forward_backward(function, batch):
    out = function(batch)
    grads = torch.autograd.grad(out, (batch.q, batch.k, batch.v), batch.grad_out)
    return {"out": out.detach(), **dict(zip(("grad_q", "grad_k", "grad_v"), grads, strict=True))}


def contenders(batch, way):
    return [
        Contender(OURS, partial(way, _ours, batch), kind="ours"),
        Contender(SDPA, partial(way, _sdpa, batch)),
        Contender(EAGER, partial(way, _eager, batch)),
    ]


def _score_flops(batch):
    """The two products of a forward over the scores that the causal mask admits."""
    queries, keys = batch.q.shape[2], batch.k.shape[2]
    seen = queries * keys - queries * (queries - 1) // 2
    return 4 * batch.q.shape[0] * batch.q.shape[1] * batch.q.shape[3] * seen


# (what, way, tokens, queries of a sequence, its keys)
CASES = [
    ("prefill", forward, 2048, 512, 512),
    ("prefill", forward, 2048, 2048, 2048),
    ("decode", forward, 1, 1, 2048),
    ("decode", forward, 16, 1, 1024),
    ("forward + backward", forward_backward, 2048, 512, 512),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("what", "way", "tokens", "length", "keys"), CASES)
def test_attention(compare, device, dtype, what, way, tokens, length, keys):
    passes = 1 if way is forward else 3  # read, read again, and the gradient written
    small = {"length": 5 if length > 1 else 1, "keys": 5, "heads": 4, "key_heads": 2, "size": 16}
    compare(
        what,
        make=partial(sequences, dtype=dtype, device=device),
        contenders=partial(contenders, way=way),
        shape={"tokens": tokens, "length": length, "keys": keys, **HEADS},
        small={"tokens": 2 * small["length"], **small},
        dtype=dtype,
        floor_bytes=lambda batch: passes * sum(x.nbytes for x in (batch.q, batch.k, batch.v, batch.grad_out)),
        flops=lambda batch: _score_flops(batch) * (1 if way is forward else 3),
    )
