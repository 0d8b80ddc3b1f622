"""Tests that need a real vLLM: docs/vllm.md says how to install it. Elsewhere they are skipped."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from minirl_kernels.integrations.transformers import enable_log_probs

pytest.importorskip("vllm", reason="vLLM is not installed")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
KINDS = {"dense": Qwen3Config(**SIZES), "moe": Qwen3MoeConfig(**SIZES, **EXPERTS)}


@pytest.fixture
def make_model():
    """A causal language model of a kind, float32, whose logits tell tokens apart."""

    def make(kind):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.mul_(4)
        return enable_log_probs(model)

    return make


@pytest.fixture
def make_engine(tmp_path):
    """An engine in this process, which is ended with the test."""
    from minirl.config import RolloutConfig, VLLMConfig
    from minirl.rollout.vllm.engine import VLLMEngine

    engines = []

    def make(model, *, dtype="float32", records_routing=False, separate_process=False, args=None, **sampling):
        args = {"kv_cache_memory_bytes": 64 << 20, **(args or {})}
        config = RolloutConfig(engine="vllm", vllm=VLLMConfig(separate_process=separate_process, args=args), **sampling)
        engine = VLLMEngine(
            config,
            dtype=dtype,
            pad_token_id=0,
            eos_token_ids=[1],
            log=tmp_path / "vllm.log",
            records_routing=records_routing,
        )
        engines.append(engine)
        engine.update_weights(model)
        return engine

    yield make
    for engine in engines:
        engine.close()
