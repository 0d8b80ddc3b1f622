"""Linear losses on two gloo processes, each with a part of the vocabulary, against one process with all of it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kept_cases import random_mask
from linear_head import random_head
from ranks import run_ranks

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss, linear_token_logprobs

# (tokens of rank 0, tokens of rank 1): equal halves, the sizes of torch.chunk, and a rank without tokens
SHARDS = [(17, 17), (31, 30), (34, 0)]


def run(call: str, backend: str = "cpu") -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_check_rank, Path(folder), call, backend)


def _check_rank(rank: int, call: str, backend: str) -> None:
    if backend == "triton":
        from verify import quick_interpreter

        quick_interpreter.install()
    for sizes in SHARDS:
        _check_split(rank, call, backend, sizes)


def _check_split(rank: int, call: str, backend: str, sizes: tuple[int, int]) -> None:
    vocab_size, first = sum(sizes), sizes[0]
    hidden, weight, token_ids, bias = random_head(12, 9, vocab_size, with_bias=True)
    # the first and the last id of each shard
    token_ids[:5] = torch.tensor([0, max(first - 1, 0), first % vocab_size, vocab_size - 1, -100])
    part = slice(0, first) if rank == 0 else slice(first, vocab_size)
    variants = [(case, bias, token_ids) for case in CASES[call]] + [(CASES[call][0], bias, token_ids.int())]
    if all(sizes):
        # one shard holds only padding: no token id lies in it, and each of its tokens has probability 0
        padding = bias.clone()
        padding[:first] = -torch.inf
        beyond = torch.where(token_ids < 0, token_ids, first + token_ids % sizes[1])
        variants.append((CASES[call][0], padding, beyond))
    for case, bias, ids in variants:
        whole = case(hidden, weight, bias, ids, None, backend)
        ours = case(hidden, weight[part], bias[part], ids, dist.group.WORLD, backend)
        *values, grad_weight, grad_bias = whole
        for actual, expected in zip(ours, (*values, grad_weight[part], grad_bias[part]), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6)
    for bad in (vocab_size, -1):
        _check_an_id_that_no_shard_has(hidden, weight[part], token_ids, bad, vocab_size, backend)


def _check_an_id_that_no_shard_has(hidden, weight, token_ids, bad, vocab_size, backend):
    leaf, ids = hidden.clone().requires_grad_(), token_ids.clone()
    ids[3] = bad

    def log_probs():
        return linear_token_logprobs(
            leaf, weight, ids, process_group=dist.group.WORLD, with_entropy=True, backend=backend
        )

    if backend == "cpu":
        with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row 3: .*in \[0, {vocab_size}\)"):
            log_probs()
        return
    outs = log_probs()
    (grad,) = torch.autograd.grad(sum(outs).sum(), leaf)
    for values in (*outs, grad):
        assert values[3].isnan().all()
        assert values[:3].isfinite().all()
        assert values[4:].isfinite().all()


def _log_probs(options, kept=None):
    """kept(token_ids) returns sets of tokens of the whole vocabulary."""

    def case(hidden, weight, bias, token_ids, group, backend):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        shared = {"process_group": group, "with_entropy": True, "backend": backend, **options}
        shared["kept"] = None if kept is None else kept(token_ids)
        outs = linear_token_logprobs(*leaves[:2], token_ids, bias=leaves[2], **shared)
        steps = torch.arange(len(token_ids)).float()
        grads = torch.autograd.grad(outs, leaves, (steps - 5, 1 - steps % 3))
        return *(out.detach() for out in outs), *grads

    return case


def _kept(token_ids):
    """For some positions, a shard holds no token of the set."""
    return random_mask(token_ids, 34)


def _policy_loss(config, kept=None):
    def case(hidden, weight, bias, token_ids, group, backend):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        gen = torch.Generator().manual_seed(1)
        old, mu = (-4 + 0.3 * torch.randn(12, generator=gen) for _ in range(2))
        out = fused_linear_policy_loss(
            *leaves[:2],
            token_ids,
            old_log_probs=old,
            rollout_log_probs=mu,
            advantages=torch.tensor([1.0, -0.5, 0.0]),
            loss_mask=None,
            cu_seqlens=torch.tensor([0, 4, 9, 12], dtype=torch.int32),
            config=config,
            bias=leaves[2],
            process_group=group,
            kept=None if kept is None else kept(token_ids),
            backend=backend,
        )
        return out.loss.detach(), out.log_probs, out.entropy, out.token_grad, *torch.autograd.grad(out.loss, leaves)

    return case


CASES = {
    "linear_token_logprobs": [
        _log_probs({}),
        _log_probs({"temperature": 0.7, "logit_softcap": 3.0}),
        _log_probs({"logit_softcap": 3.0}, _kept),
    ],
    "fused_linear_policy_loss": [
        _policy_loss(PolicyLossConfig(entropy_coef=0.1)),
        _policy_loss(PolicyLossConfig.gspo()),
        _policy_loss(PolicyLossConfig(entropy_coef=0.1), _kept),
    ],
}
