"""A mixture of experts, sharded by FSDP2 over two gloo processes, against one process.

Each of the two processes has half of the responses.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from ranks import RANKS, run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from minirl_kernels.integrations.transformers import enable_log_probs


def run(folder: Path) -> None:
    run_ranks(_check_rank, folder)


def _check_rank(rank: int) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    config = Qwen3MoeConfig(vocab_size=34, num_key_value_heads=1, initializer_range=0.3, **sizes)
    whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="minirl")
    input_ids = torch.randint(34, (2 * RANKS, 5))
    old_log_probs, advantages = -3 - torch.rand(input_ids.shape), torch.tensor([1.0, -0.5, 0.75, -1.0])

    def loss_of(model, responses):
        policy_loss = {
            "old_log_probs": old_log_probs[responses],
            "rollout_log_probs": old_log_probs[responses],
            "advantages": advantages[responses],
            "loss_mask": None,
            "num_responses": len(input_ids),
        }
        ids = input_ids[responses]
        old = model(ids, token_ids=ids, use_cache=False).log_probs.sum()
        return old + model(ids, token_ids=ids, use_cache=False, policy_loss=policy_loss).loss

    for enable_first in (True, False):
        model = _sharded(copy.deepcopy(whole), enable_first)
        expected = enable_log_probs(copy.deepcopy(whole))
        loss_of(expected, slice(None)).backward()
        loss_of(model, slice(2 * rank, 2 * rank + 2)).backward()
        for actual, weight in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(RANKS * actual.grad.full_tensor(), weight.grad)  # FSDP averages over the ranks
    apart = _sharded(copy.deepcopy(whole), True, head_apart=True)
    with pytest.raises(TypeError, match="the weight of the output embeddings is a DTensor: it must be a plain tensor"):
        loss_of(apart, slice(None))


def _sharded(model, enable_first, head_apart=False):
    mesh = init_device_mesh("cpu", (RANKS,))
    if enable_first:
        enable_log_probs(model)
    for part in [*model.model.layers, *([model.lm_head] if head_apart else [])]:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return enable_log_probs(model)
