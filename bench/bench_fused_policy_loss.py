"""fused_policy_loss, forward and backward, in both modes, beside the alternatives and copies of the logits."""

from __future__ import annotations

from functools import partial

import peers
import pytest
import torch
from batches import policy_batch
from harness import Bar, Contender

from minirl_kernels import fused_policy_loss

FRESH, OVERWRITE = "fused_policy_loss", "fused_policy_loss(overwrite_logits=True)"
WARM_COPY, FRESH_COPY = "copy_ into a warm tensor", "copy into a fresh tensor"


def ours(batch, overwrite_logits):
    out = fused_policy_loss(
        batch.logits,
        batch.token_ids,
        old_log_probs=batch.old_log_probs,
        rollout_log_probs=batch.rollout_log_probs,
        advantages=batch.advantages,
        loss_mask=None,
        config=batch.config,
        overwrite_logits=overwrite_logits,
    )
    (grad,) = torch.autograd.grad(out.loss, batch.logits)
    metrics = out.metrics.compute()
    return {
        "loss": out.loss.detach(),
        "log_probs": out.log_probs,
        "entropy": out.entropy,
        "metrics": torch.tensor([metrics[name] for name in peers.METRICS]),
        "grad": grad,
    }


def contenders(batch):
    logits = batch.logits.detach()
    warm = torch.empty_like(logits)
    return [
        Contender(FRESH, partial(ours, batch, False), kind="ours"),
        Contender(OVERWRITE, partial(ours, batch, True), kind="ours"),
        *peers.contenders(peers.POLICY_LOSS, batch, batch.logits.device),
        Contender(WARM_COPY, lambda: {"copy": warm.copy_(logits)}, kind="floor"),
        Contender(FRESH_COPY, lambda: {"copy": logits.clone()}, kind="floor"),
    ]


def cpu_bars(dtype):
    """The bars of a CPU at the vocabulary of Qwen3; a GPU has none."""
    half = dtype != torch.float32
    return [
        *(Bar(mode, "speed", peers.EAGER, 20 if half else 10) for mode in (FRESH, OVERWRITE)),
        *(Bar(mode, "speed", peers.TRL, 6) for mode in (FRESH, OVERWRITE)),
        Bar(OVERWRITE, "time", WARM_COPY, 4 if half else 2),
        Bar(FRESH, "time", FRESH_COPY, 2 if half else 1.5),
        # less than half a bit per float32 logit: no array of T * V entries fits
        Bar(OVERWRITE, "memory", FRESH_COPY, 0.015),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_size", [151_936, 32_000])
def test_forward_backward(compare, device, dtype, vocab_size):
    large = vocab_size > 100_000
    compare(
        "forward + backward",
        make=partial(policy_batch, dtype=dtype, device=device),
        contenders=contenders,
        shape={"tokens": 512 if large else 1024, "vocab_size": vocab_size},
        small={"tokens": 12, "vocab_size": 515},
        dtype=dtype,
        floor_bytes=lambda batch: 2 * batch.logits.nbytes,  # every logit read once, its gradient written once
        bars=cpu_bars(dtype) if large and device.type == "cpu" else [],
    )
