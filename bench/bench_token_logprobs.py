"""token_logprobs with entropy: forward, and forward with backward through both."""

from __future__ import annotations

from functools import partial

import peers
import pytest
import torch
from batches import policy_batch
from harness import Contender

from minirl_kernels import token_logprobs

OURS = "token_logprobs"


@torch.no_grad()
def forward(batch):
    log_probs, entropy = token_logprobs(batch.logits, batch.token_ids, with_entropy=True)
    return {"log_probs": log_probs, "entropy": entropy}


def forward_backward(batch):
    log_probs, entropy = token_logprobs(batch.logits, batch.token_ids, with_entropy=True)
    upstream = (batch.grad_log_probs, batch.grad_entropy)
    (grad,) = torch.autograd.grad((log_probs, entropy), batch.logits, upstream)
    return {"log_probs": log_probs.detach(), "entropy": entropy.detach(), "grad": grad}


def contenders(batch, ours, alternatives):
    logits = batch.logits.detach()
    warm = torch.empty_like(logits)
    return [
        Contender(OURS, partial(ours, batch), kind="ours"),
        *peers.contenders(alternatives, batch, batch.logits.device),
        Contender("copy_ into a warm tensor", lambda: {"copy": warm.copy_(logits)}, kind="floor"),
        Contender("copy into a fresh tensor", lambda: {"copy": logits.clone()}, kind="floor"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("vocab_size", [151_936, 32_000])
@pytest.mark.parametrize(
    ("what", "ours", "alternatives", "passes"),
    [
        ("forward", forward, peers.LOG_PROBS, 1),
        ("forward + backward", forward_backward, peers.LOG_PROBS_BACKWARD, 3),  # read, read again, write
    ],
    ids=["forward", "forward_backward"],
)
def test_token_logprobs(compare, device, dtype, vocab_size, what, ours, alternatives, passes):
    large = vocab_size > 100_000
    compare(
        what,
        make=partial(policy_batch, dtype=dtype, device=device),
        contenders=partial(contenders, ours=ours, alternatives=alternatives),
        shape={"tokens": 512 if large else 1024, "vocab_size": vocab_size},
        small={"tokens": 12, "vocab_size": 515},
        dtype=dtype,
        floor_bytes=lambda batch: passes * batch.logits.nbytes,
    )
