"""rms_norm, forward and with both gradients, beside torch's and transformers' formulas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import Contender, Inputs
from torch import Tensor
from torch.nn import functional as F

from minirl_kernels import rms_norm

OURS, EPS = "rms_norm", 1e-6


@dataclass
class NormBatch(Inputs):
    x: Tensor  # [T, H], requires grad, as does weight [H]
    weight: Tensor
    grad: Tensor


def norm_batch(tokens, hidden_size, *, dtype, device) -> NormBatch:
    generator = torch.Generator(device).manual_seed(0)
    x, grad = (torch.randn(tokens, hidden_size, device=device, generator=generator).to(dtype) for _ in range(2))
    weight = 1 + torch.randn(hidden_size, device=device, generator=generator).to(dtype) / 4
    return NormBatch(x.requires_grad_(), weight.requires_grad_(), grad)


def of_torch(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def of_transformers(x, weight, eps):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@torch.no_grad()
def forward(batch, call):
    return {"out": call(batch.x, batch.weight, EPS)}


def forward_backward(batch, call):
    out = call(batch.x, batch.weight, EPS)
    grad_x, grad_weight = torch.autograd.grad(out, (batch.x, batch.weight), batch.grad)
    return {"out": out.detach(), "grad_x": grad_x, "grad_weight": grad_weight}


def contenders(batch, run):
    x = batch.x.detach()
    return [
        Contender(OURS, partial(run, batch, rms_norm), kind="ours"),
        Contender("torch.nn.functional.rms_norm", partial(run, batch, of_torch)),
        Contender("transformers' formulas", partial(run, batch, of_transformers)),
        Contender("copy into a fresh tensor", lambda: {"copy": x.clone()}, kind="floor"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "hidden_size"), [(4096, 2048), (65_536, 128), (16, 2048)])
@pytest.mark.parametrize(
    ("what", "run", "passes"),
    [("forward", forward, 2), ("forward + backward", forward_backward, 5)],
    ids=["fwd", "bwd"],
)
def test_rms_norm(compare, device, dtype, tokens, hidden_size, what, run, passes):
    compare(
        what,
        make=partial(norm_batch, dtype=dtype, device=device),
        contenders=partial(contenders, run=run),
        shape={"tokens": tokens, "hidden_size": hidden_size},
        small={"tokens": 12, "hidden_size": 515},
        dtype=dtype,
        floor_bytes=lambda batch: passes * batch.x.nbytes,  # x and the result; x, the gradient and d x
    )
