"""Calls that a CUDA graph can hold, with their inputs. A graph reads its inputs at fixed addresses in each replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from policy_batches import random_batch
from torch import Tensor

from minirl_kernels import PolicyLossConfig, attention, fused_policy_loss, moe_experts, moe_routing, policy_loss

LENGTHS = [5, 1, 4, 9]


@dataclass
class GraphCase:
    """run(inputs) returns the results of the call and its gradients. make(seed) returns inputs of the same shapes."""

    make: Callable[[int], dict[str, Tensor]]
    run: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def graph_cases(device: str, backend: str = "auto") -> dict[str, GraphCase]:
    """The cases by name; `backend` is that of the ops that have backends."""

    def on_device(tensors):
        return {name: x.to(device) for name, x in tensors.items() if isinstance(x, Tensor)}

    def losses(config, layout):
        def make(seed):
            batch = random_batch(LENGTHS, vocab_size=65, seed=seed)
            tensors = {name: batch.lay_out(getattr(batch, name), layout) for name in ("logits", "token_ids")}
            if layout == "padded":  # the poison in the padding is for tests that never read it
                tensors["token_ids"].clamp_(max=64)
            return on_device({**tensors, **batch.arguments(layout)})

        def run(inputs):
            inputs = dict(inputs)
            logits = inputs.pop("logits").requires_grad_()
            out = fused_policy_loss(logits, inputs.pop("token_ids"), config=config, backend=backend, **inputs)
            (grad,) = torch.autograd.grad(out.loss, logits)
            return out.loss.detach(), out.log_probs, out.entropy, out.metrics.sums, out.metrics.maxima, grad

        return GraphCase(make, run)

    def loss_of_log_probs():
        def make(seed):
            batch = random_batch(LENGTHS, seed=seed)
            return on_device({"log_probs": batch.log_probs, **batch.arguments("packed")})

        def run(inputs):
            inputs = dict(inputs)
            log_probs = inputs.pop("log_probs").requires_grad_()
            out = policy_loss(log_probs, **inputs)
            (grad,) = torch.autograd.grad(out.loss, log_probs)
            return out.loss.detach(), out.metrics.sums, out.metrics.maxima, grad

        return GraphCase(make, run)

    def normal(seed, **shapes):
        generator = torch.Generator().manual_seed(seed)
        return on_device({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})

    def experts():
        def run(inputs):
            leaves = [inputs[name].requires_grad_() for name in ("hidden", "logits", "gate_up", "down")]
            hidden, logits, gate_up, down = leaves
            out = moe_experts(hidden, moe_routing(logits, 2, backend=backend), gate_up, down, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, inputs["upstream"])

        sizes = {"hidden": (17, 32), "logits": (17, 6), "gate_up": (6, 32, 32), "down": (6, 32, 16)}
        return GraphCase(lambda seed: normal(seed, **sizes, upstream=(17, 32)), run)

    def packed_attention():
        offsets = torch.tensor([0, 5, 6, 19], device=device)

        def run(inputs):
            leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v")]
            out = attention(*leaves, cu_seqlens_q=offsets, cu_seqlens_k=offsets, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, inputs["upstream"])

        sizes = {"q": (19, 4, 16), "k": (19, 2, 16), "v": (19, 2, 16), "upstream": (19, 4, 16)}
        return GraphCase(lambda seed: normal(seed, **sizes), run)

    return {
        "fused_policy_loss": losses(PolicyLossConfig(), "packed"),
        "fused_policy_loss, padded": losses(PolicyLossConfig(), "padded"),
        "fused_policy_loss in two phases": losses(PolicyLossConfig.gspo(), "packed"),
        "policy_loss": loss_of_log_probs(),
        "moe_experts": experts(),
        "attention": packed_attention(),
    }
