"""fused_linear_policy_loss, forward and backward, beside the alternatives and the three bare matmuls."""

from __future__ import annotations

from functools import partial

import linear_peers
import pytest
import torch
from harness import Bar, Contender
from linear_peers import CCE, LIGER, NAIVE, TORCH, TRL, linear_batch

from minirl_kernels import fused_linear_policy_loss

OURS, HALF = "fused_linear_policy_loss", "fused_linear_policy_loss, half the responses at zero advantage"
BARE = "three bare matmuls"


def ours(batch, advantages):
    out = fused_linear_policy_loss(
        batch.hidden,
        batch.weight,
        batch.token_ids,
        old_log_probs=batch.old_log_probs,
        rollout_log_probs=batch.rollout_log_probs,
        advantages=advantages,
        loss_mask=None,
        config=batch.config,
    )
    grad_hidden, grad_weight = torch.autograd.grad(out.loss, (batch.hidden, batch.weight))
    return {
        "loss": out.loss.detach(),
        "log_probs": out.log_probs,
        "entropy": out.entropy,
        "grad_hidden": grad_hidden,
        "grad_weight": grad_weight,
    }


def half_of_it(batch):
    outputs = ours(batch, batch.advantages * torch.tensor([1.0, 0.0, 1.0, 0.0]).to(batch.advantages))
    return {name: outputs[name] for name in ("log_probs", "entropy")}


def contenders(batch):
    return [
        Contender(OURS, partial(ours, batch, batch.advantages), kind="ours"),
        Contender(HALF, partial(half_of_it, batch), kind="ours"),
        *linear_peers.contenders(batch),
        Contender(BARE, partial(linear_peers.bare_matmuls, batch), kind="floor"),
    ]


def cpu_bars(dtype, hidden_size):
    """The bars of a CPU; a GPU has none."""
    naive = 2 if hidden_size <= 256 else 1.2 if dtype == torch.float32 else 1.35
    return [
        Bar(OURS, "time", BARE, 1.15),
        Bar(OURS, "speed", NAIVE, naive),
        *(Bar(OURS, "speed", peer, 1.3) for peer in (TORCH, LIGER, TRL, CCE)),
        *(Bar(OURS, "memory", peer, 1) for peer in (NAIVE, TORCH, LIGER, TRL, CCE)),
        Bar(HALF, "speed", OURS, 1.3),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "hidden_size", "vocab_size"), [(2048, 1024, 151_936), (4096, 256, 32_000)])
def test_forward_backward(compare, device, dtype, tokens, hidden_size, vocab_size):
    element = dtype.itemsize
    compare(
        "forward + backward",
        make=partial(linear_batch, dtype=dtype, device=device),
        contenders=contenders,
        shape={"tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab_size},
        small={"tokens": 12, "hidden_size": 48, "vocab_size": 515},
        dtype=dtype,
        # each operand read once, its gradient written once
        floor_bytes=lambda batch: 2 * element * (batch.hidden.numel() + batch.weight.numel()),
        flops=lambda batch: 6 * batch.hidden.numel() * batch.weight.shape[0],
        bars=cpu_bars(dtype, hidden_size) if device.type == "cpu" else [],
    )
