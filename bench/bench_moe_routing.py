"""moe_routing beside transformers' formulas: natural experts forward, replayed experts forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from harness import Contender, Inputs
from peers import no_compiler
from torch import Tensor

from minirl_kernels import moe_routing

OURS = "moe_routing"
QWEN3 = {"num_experts": 128, "top_k": 8}
DEEPSEEK = {"num_experts": 256, "top_k": 8, "num_groups": 8, "top_k_groups": 4}


@dataclass
class RouterBatch(Inputs):
    """With groups: a sigmoid with a bias, as in DeepSeek-V3. Without: a softmax over the chosen, as in Qwen3-MoE."""

    logits: Tensor  # [T, E], requires grad
    experts: Tensor  # [T, K] uint8, chosen by drifted logits
    grad_weights: Tensor
    bias: Tensor | None
    num_groups: int | None
    top_k_groups: int | None

    @property
    def options(self) -> dict:
        if self.num_groups is None:
            return {}
        return {
            "scoring": "sigmoid",
            "correction_bias": self.bias,
            "num_groups": self.num_groups,
            "top_k_groups": self.top_k_groups,
            "scale": 2.5,
        }


def router_batch(tokens, num_experts, top_k, *, dtype, device, num_groups=None, top_k_groups=None) -> RouterBatch:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    logits = 2 * normal(tokens, num_experts)
    drifted = logits + normal(tokens, num_experts)
    return RouterBatch(
        logits=logits.to(dtype).requires_grad_(),
        experts=drifted.topk(top_k).indices.to(torch.uint8),
        grad_weights=normal(tokens, top_k),
        bias=normal(num_experts) / 8 if num_groups else None,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
    )


@torch.no_grad()
def natural(batch, **where):
    routing = moe_routing(batch.logits, batch.experts.shape[1], **batch.options, **where)
    return {"weights": routing.weights}


def replayed(batch, **where):
    routing = moe_routing(batch.logits, batch.experts.shape[1], routed_experts=batch.experts, **batch.options, **where)
    (grad,) = torch.autograd.grad(routing.weights, batch.logits, batch.grad_weights)
    return {"weights": routing.weights.detach(), "agreement": routing.agreement, "grad": grad}


def _their_choice(logits, top_k, bias, num_groups, top_k_groups):
    """Scores and natural experts, as transformers' routers compute them."""
    if num_groups is None:
        scores = torch.softmax(logits, -1, dtype=torch.float)
        return scores, torch.topk(scores, top_k, dim=-1).indices
    scores = logits.float().sigmoid()
    by_group = (scores + bias).unflatten(-1, (num_groups, -1))
    groups = torch.topk(by_group.topk(2, dim=-1).values.sum(-1), top_k_groups, dim=-1, sorted=False).indices
    kept = torch.zeros(by_group.shape[:2], dtype=torch.bool, device=logits.device).scatter_(1, groups, True)
    return scores, torch.topk(by_group.masked_fill(~kept[..., None], -torch.inf).flatten(1), top_k, dim=-1).indices


def _their_weights(logits, experts, top_k, bias, num_groups, top_k_groups):
    scores, chosen = _their_choice(logits, top_k, bias, num_groups, top_k_groups)
    weights = scores.gather(1, chosen if experts is None else experts.long())
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * (1.0 if num_groups is None else 2.5)
    if experts is None:
        return weights, None
    shared = (experts.long()[:, :, None] == chosen[:, None, :]).any(-1)
    return weights, shared.float().mean(-1)


# fullgraph: at dynamo's limit of recompilations it raises and does not fall back to eager torch
_their_weights_compiled = torch.compile(_their_weights, dynamic=False, fullgraph=True)


def _of(batch):
    return batch.experts.shape[1], batch.bias, batch.num_groups, batch.top_k_groups


@torch.no_grad()
def their_natural(batch, weights_of):
    return {"weights": weights_of(batch.logits, None, *_of(batch))[0]}


def their_replayed(batch, weights_of):
    weights, agreement = weights_of(batch.logits, batch.experts, *_of(batch))
    (grad,) = torch.autograd.grad(weights, batch.logits, batch.grad_weights)
    return {"weights": weights.detach(), "agreement": agreement, "grad": grad}


def contenders(batch, ours, theirs):
    logits = batch.logits.detach()
    return [
        Contender(OURS, partial(ours, batch), kind="ours"),
        Contender("its reference", partial(ours, batch, backend="reference")),
        Contender("transformers' formulas", partial(theirs, batch, _their_weights)),
        Contender(
            "torch.compile of them",
            partial(theirs, batch, _their_weights_compiled),
            missing=no_compiler(logits.device),
            compiles=True,
        ),
        Contender("copy into a fresh tensor", lambda: {"copy": logits.clone()}, kind="floor"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("router", [QWEN3, DEEPSEEK], ids=["qwen3", "deepseek"])
@pytest.mark.parametrize(
    ("what", "ours", "theirs", "passes"),
    [
        ("natural, forward", natural, their_natural, 1),
        ("replayed, forward + backward", replayed, their_replayed, 2),  # read, and the gradient written
    ],
    ids=["natural", "replayed"],
)
def test_moe_routing(compare, device, dtype, router, what, ours, theirs, passes):
    compare(
        what,
        make=partial(router_batch, dtype=dtype, device=device),
        contenders=partial(contenders, ours=ours, theirs=theirs),
        shape={"tokens": 16_384, **router},
        small={"tokens": 40, **router},
        dtype=dtype,
        floor_bytes=lambda batch: passes * batch.logits.nbytes,
    )
