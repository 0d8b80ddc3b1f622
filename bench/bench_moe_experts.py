"""moe_experts, forward and with backward, beside transformers, two inference engines and the bare matmuls."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import experts_peers
import pytest
import torch
from experts_peers import SGLANG, VLLM, packed
from harness import Bar, Contender, Inputs
from torch import Tensor
from torch.nn import functional as F

from minirl_kernels import moe_experts, pack_experts

OURS, GROUPED, EAGER, BARE = "moe_experts", "transformers, grouped_mm", "transformers, eager", "bare matmuls"
SHAPE = {"hidden_size": 2048, "intermediate_size": 768, "num_experts": 16, "top_k": 4}


@dataclass
class ExpertsBatch(Inputs):
    hidden: Tensor  # [T, H], as all but experts requires grad
    weights: Tensor  # [T, K] float32
    experts: Tensor  # [T, K]
    gate_up_proj: Tensor
    down_proj: Tensor
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.hidden, self.weights, self.gate_up_proj, self.down_proj


def experts_batch(tokens, hidden_size, intermediate_size, num_experts, top_k, *, dtype, device) -> ExpertsBatch:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator)

    weights, experts = torch.softmax(normal(tokens, num_experts), -1).topk(top_k)
    return ExpertsBatch(
        hidden=normal(tokens, hidden_size).to(dtype).requires_grad_(),
        weights=(weights / weights.sum(-1, keepdim=True)).requires_grad_(),
        experts=experts,
        gate_up_proj=(normal(num_experts, 2 * intermediate_size, hidden_size) / hidden_size**0.5)
        .to(dtype)
        .requires_grad_(),
        down_proj=(normal(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5)
        .to(dtype)
        .requires_grad_(),
        grad_out=normal(tokens, hidden_size).to(dtype),
    )


def _ours(batch):
    return moe_experts(batch.hidden, (batch.weights, batch.experts), batch.gate_up_proj, batch.down_proj)


def _packed_before(batch):
    """Ours as in a rollout engine, which packs the weights once for many calls."""
    weights = pack_experts(batch.gate_up_proj.detach(), batch.down_proj.detach())
    return lambda batch: moe_experts(batch.hidden, (batch.weights, batch.experts), *weights)


def _theirs(implementation, batch):
    """Qwen3-MoE's experts around the batch's own parameters."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    num_experts, hidden_size, width = batch.down_proj.shape
    config = Qwen3MoeConfig(hidden_size=hidden_size, moe_intermediate_size=width, num_experts=num_experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.config = config
    parameters = {"gate_up_proj": batch.gate_up_proj, "down_proj": batch.down_proj}

    def run(batch):
        # the router of Qwen3-MoE returns its weights in the dtype of the model
        arguments = (batch.hidden, batch.experts, batch.weights.to(batch.hidden.dtype))
        return torch.func.functional_call(module, parameters, arguments)

    return run


def forward(function, batch):
    with torch.no_grad():
        return {"out": function(batch)}


def forward_backward(function, batch):
    out = function(batch)
    names = ("grad_hidden", "grad_weights", "grad_gate_up_proj", "grad_down_proj")
    grads = torch.autograd.grad(out, batch.leaves, batch.grad_out)
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def bare_matmuls(batch, backward):
    """The matmuls of every implementation, expert by expert, on rows gathered before."""
    operands = []
    for expert, (gate_up, down) in enumerate(zip(batch.gate_up_proj.detach(), batch.down_proj.detach(), strict=True)):
        tokens = (batch.experts == expert).nonzero()[:, 0]
        x, grad = batch.hidden.detach()[tokens], batch.grad_out[tokens]
        halves = F.linear(x, gate_up)
        operands.append((x, grad, gate_up, down, halves, halves[:, : down.shape[1]].contiguous()))

    def run():
        outputs = []
        for x, grad, gate_up, down, halves, activation in operands:
            if len(x):
                outputs += [F.linear(x, gate_up), F.linear(activation, down)]
                if backward:
                    outputs += [grad @ down, halves @ gate_up, halves.T @ x, grad.T @ activation]
        return {str(number): output for number, output in enumerate(outputs)}

    return run


def contenders(batch, way):
    rollout = []
    if way is forward and batch.hidden.device.type == "cpu":
        rollout.append(Contender(packed(OURS), partial(way, _packed_before(batch), batch), kind="ours"))
        rollout += experts_peers.contenders(batch)
    return [
        Contender(OURS, partial(way, _ours, batch), kind="ours"),
        Contender(GROUPED, partial(way, _theirs("grouped_mm", batch), batch)),
        Contender(EAGER, partial(way, _theirs("eager", batch), batch)),
        *rollout,
        Contender(BARE, bare_matmuls(batch, way is forward_backward), kind="floor"),
    ]


def cpu_bars(tokens, way, dtype):
    """The bars of a CPU."""
    if way is forward:
        engines = [VLLM] if dtype == torch.float32 else [VLLM, SGLANG]
        return [
            Bar(ours, "speed", theirs, 1)
            for engine in engines
            for ours, theirs in ((packed(OURS), packed(engine)), (OURS, engine))
        ]
    return [Bar(OURS, "speed", GROUPED, 1.25 if tokens > 64 else 1.5), Bar(OURS, "time", BARE, 1.15)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 16, 64, 512])
@pytest.mark.parametrize("way", [forward, forward_backward], ids=["forward", "forward_backward"])
def test_moe_experts(compare, device, dtype, tokens, way):
    passes = 1 if way is forward else 3  # read, read again, and the gradient written
    compare(
        "forward" if way is forward else "forward + backward",
        make=partial(experts_batch, dtype=dtype, device=device),
        contenders=partial(contenders, way=way),
        shape={"tokens": tokens, **SHAPE},
        small={"tokens": 1, "hidden_size": 64, "intermediate_size": 64, "num_experts": 8, "top_k": 4},
        dtype=dtype,
        floor_bytes=lambda batch: (
            passes
            * (batch.gate_up_proj.nbytes + batch.down_proj.nbytes)
            * len(batch.experts.unique())
            // len(batch.down_proj)
        ),
        flops=lambda batch: (
            (2 if way is forward else 6) * batch.experts.numel() * batch.gate_up_proj[0].numel() * 3 // 2
        ),
        bars=cpu_bars(tokens, way, dtype) if device.type == "cpu" else [],
    )
