"""softmax and log_softmax, forward and with backward, beside torch's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import Contender, Inputs
from torch import Tensor

from minirl_kernels import log_softmax, softmax


@dataclass
class RowsBatch(Inputs):
    x: Tensor  # [T, V], requires grad
    grad: Tensor


def rows_batch(tokens, vocab_size, *, dtype, device) -> RowsBatch:
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(tokens, vocab_size, device=device, generator=generator).to(dtype) for _ in range(2))
    return RowsBatch((2 * x).requires_grad_(), grad)


@torch.no_grad()
def forward(batch, call):
    return {"out": call(batch.x, -1)}


def forward_backward(batch, call):
    out = call(batch.x, -1)
    (grad,) = torch.autograd.grad(out, batch.x, batch.grad)
    return {"out": out.detach(), "grad": grad}


def contenders(batch, run, ours, theirs):
    x = batch.x.detach()
    return [
        Contender(ours.__name__, partial(run, batch, ours), kind="ours"),
        Contender(f"torch.{ours.__name__}", partial(run, batch, theirs)),
        Contender("copy into a fresh tensor", lambda: {"copy": x.clone()}, kind="floor"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "vocab_size"), [(128, 151_936), (16_384, 512)])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(softmax, torch.softmax), (log_softmax, torch.log_softmax)], ids=["softmax", "log_softmax"]
)
@pytest.mark.parametrize(
    ("what", "run", "passes"),
    [("forward", forward, 2), ("forward + backward", forward_backward, 5)],
    ids=["fwd", "bwd"],
)
def test_softmax(compare, device, dtype, tokens, vocab_size, ours, theirs, what, run, passes):
    compare(
        f"{ours.__name__}, {what}",
        make=partial(rows_batch, dtype=dtype, device=device),
        contenders=partial(contenders, run=run, ours=ours, theirs=theirs),
        shape={"tokens": tokens, "vocab_size": vocab_size},
        small={"tokens": 12, "vocab_size": 515},
        dtype=dtype,
        floor_bytes=lambda batch: passes * batch.x.nbytes,  # x and the result; the gradient, the result and d x
    )
