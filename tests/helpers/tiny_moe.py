"""Tiny mixture-of-experts models of transformers, by name. Their routers have clear favourites."""

import torch
import transformers

from minirl_kernels import RoutedExperts, moe_experts
from minirl_kernels.versions import OLDEST_TRANSFORMERS

# the oldest supported transformers has fewer models
IS_OLDEST = transformers.__version__.startswith(OLDEST_TRANSFORMERS)

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
CONFIGS = {
    "Qwen3Moe": {
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 8},
    "DeepseekV3": {
        **DEEPSEEK,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "Glm4Moe": {**DEEPSEEK, "head_dim": 8},
}
# models with other routers, which the tests of experts and attention do not need
OTHER_ROUTERS = {
    "Afmoe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "head_dim": 8,
        "layer_types": ["full_attention"] * 3,
    },
    "DeepseekV2": {
        **DEEPSEEK,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "Ernie4_5_Moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "HYV3": {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "moe_intermediate_size": 16},
    "HunYuanMoEV1": {"num_experts": 8, "moe_topk": 2, "head_dim": 8, "moe_intermediate_size": 16},
    "Llama4": {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 8, "intermediate_size_mlp": 48},
    "MiniMaxM2": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
}


def tiny(name, *, seed=0, **changes):
    """`<name>ForCausalLM` in float32, in training mode, without dropout."""
    torch.manual_seed(seed)
    config = getattr(transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")
    changes = {**COMMON, **(CONFIGS | OTHER_ROUTERS)[name], **changes}
    model = getattr(transformers, f"{name}ForCausalLM")(config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in gate_weights(model):
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)
        for name, bias in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                bias.copy_(torch.randn(bias.shape, generator=generator) / 10)
    return model.train()


def gates(model):
    suffixes = ("topkrouter", "tokenchoicerouter", "llama4router", "v1gate")
    return [module for module in model.modules() if type(module).__name__.lower().endswith(suffixes)]


def gate_weights(model):
    """The weight [E, H] of each router; some routers hold it in a linear layer."""
    return [
        next(weight for weight in gate.parameters() if weight.shape[0] == gate.num_experts) for gate in gates(model)
    ]


def token_ids(batch=2, length=9, seed=0):
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_experts(model, tokens, seed=3):
    """RoutedExperts with random experts for each token in each layer of the model."""
    gate, layers = gates(model)[0], len(gates(model))
    scores = torch.rand((tokens, layers, gate.num_experts), generator=torch.Generator().manual_seed(seed))
    return RoutedExperts.from_ids(scores.argsort(-1)[..., : gate.top_k], num_experts=gate.num_experts)


def gradients(model, loss):
    """The gradient of each parameter that the loss depends on, by name."""
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def count_calls(monkeypatch):
    """[number of tokens of each call of moe_experts from a model of transformers]"""
    seen = []

    def counted(hidden, *arguments):
        seen.append(len(hidden))
        return moe_experts(hidden, *arguments)

    monkeypatch.setattr("minirl_kernels.integrations.transformers.experts.moe_experts", counted)
    return seen
