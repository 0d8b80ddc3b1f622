"""Elementwise functions, whose bits do not depend on an element's place, beside torch's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import Contender, Inputs
from torch import Tensor

from minirl_kernels import gelu, mish, sigmoid, silu, softplus

FUNCTIONS = {
    "gelu": (gelu, F.gelu),
    "gelu_tanh": (partial(gelu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "mish": (mish, F.mish),
    "sigmoid": (sigmoid, torch.sigmoid),
    "silu": (silu, F.silu),
    "softplus": (softplus, F.softplus),
}


@dataclass
class Activations(Inputs):
    x: Tensor  # [T, H], requires grad
    grad: Tensor


def activations(tokens, hidden_size, *, dtype, device) -> Activations:
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(tokens, hidden_size, device=device, generator=generator).to(dtype) for _ in range(2))
    return Activations(x.requires_grad_(), grad)


@torch.no_grad()
def forward(batch, function):
    return {"out": function(batch.x)}


def forward_backward(batch, function):
    out = function(batch.x)
    (grad,) = torch.autograd.grad(out, batch.x, batch.grad)
    return {"out": out.detach(), "grad": grad}


def contenders(batch, name, run):
    ours, torchs = FUNCTIONS[name]
    x = batch.x.detach()
    return [
        Contender(name, partial(run, batch, ours), kind="ours"),
        Contender("torch's own", partial(run, batch, torchs)),
        Contender("copy into a fresh tensor", lambda: {"copy": x.clone()}, kind="floor"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("what", "run", "passes"),
    [
        ("forward", forward, 2),
        ("forward + backward", forward_backward, 5),
    ],  # x and the result; x, the gradient, the result and d x
    ids=["forward", "forward_backward"],
)
def test_elementwise(compare, device, dtype, name, what, run, passes):
    compare(
        f"{name}, {what}",
        make=partial(activations, dtype=dtype, device=device),
        contenders=partial(contenders, name=name, run=run),
        shape={"tokens": 1024, "hidden_size": 6144},
        small={"tokens": 7, "hidden_size": 515},
        dtype=dtype,
        floor_bytes=lambda batch: passes * batch.x.nbytes,
    )
