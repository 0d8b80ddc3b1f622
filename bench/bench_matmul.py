"""linear, called and in batch-invariant mode, with and without its gradients, beside torch's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import Bar, Contender, Inputs
from torch import Tensor
from torch.nn import functional as F

from minirl_kernels import batch_invariant_mode, linear

OURS, CALLED, TORCH = "F.linear in batch_invariant_mode", "linear", "F.linear"


@dataclass
class LinearBatch(Inputs):
    x: Tensor  # [T, K], as weight requires grad
    weight: Tensor  # [N, K]
    grad_out: Tensor  # [T, N]


def linear_batch(tokens, in_features, out_features, *, dtype, device) -> LinearBatch:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    return LinearBatch(
        x=normal(tokens, in_features).to(dtype).requires_grad_(),
        weight=(normal(out_features, in_features) / in_features**0.5).to(dtype).requires_grad_(),
        grad_out=normal(tokens, out_features).to(dtype),
    )


@torch.no_grad()
def forward(function, batch):
    return {"out": function(batch.x, batch.weight)}


def forward_backward(function, batch):
    out = function(batch.x, batch.weight)
    grad_x, grad_weight = torch.autograd.grad(out, (batch.x, batch.weight), batch.grad_out)
    return {"out": out.detach(), "grad_x": grad_x, "grad_weight": grad_weight}


def contenders(batch, way):
    return [
        Contender(OURS, partial(way, F.linear, batch), kind="ours"),
        Contender(CALLED, partial(way, linear, batch), kind="ours"),
        Contender(TORCH, batch_invariant_mode(False)(partial(way, F.linear, batch))),
    ]


def cpu_bars(tokens):
    """The bars of a CPU, for decoding and for training."""
    if tokens <= 16:
        return [Bar(OURS, "speed", TORCH, 1)]
    return [Bar(OURS, "speed", TORCH, 0.9)] if tokens >= 512 else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("way", "tokens", "in_features", "out_features"),
    [
        *((forward, tokens, 2048, 2048) for tokens in (1, 4, 16, 64, 512, 2048, 4096)),
        *((forward, tokens, 1024, 4096) for tokens in (1, 16, 512)),
        (forward_backward, 512, 2048, 2048),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_matmul(compare, device, dtype, way, tokens, in_features, out_features):
    passes = 1 if way is forward else 3  # the weight is read, read again, and its gradient written
    with batch_invariant_mode():  # around all runs, since entering it costs more than a product
        compare(
            "forward" if way is forward else "forward + backward",
            make=partial(linear_batch, dtype=dtype, device=device),
            contenders=partial(contenders, way=way),
            shape={"tokens": tokens, "in_features": in_features, "out_features": out_features},
            small={"tokens": 1, "in_features": 33, "out_features": 40},
            dtype=dtype,
            floor_bytes=lambda batch: passes * (batch.x.nbytes + batch.weight.nbytes + batch.grad_out.nbytes),
            flops=lambda batch: passes * 2 * batch.x.shape[0] * batch.weight.numel(),
            bars=cpu_bars(tokens) if device.type == "cpu" else [],
        )
