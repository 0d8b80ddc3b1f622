"""A tiny causal language model of every family in transformers that permits one, from one table of sizes."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

# the names of sizes in the configs; a family takes the keys that its config has
_SIZES = {
    **dict.fromkeys(
        ("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "sliding_window"), 64
    ),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "conv_dim", "embedding_size"), 32),
    **dict.fromkeys(("lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "v_head_dim", "head_size", "kv_channels", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_conv_kernel_dim"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "mamba_chunk_size", "attention_window_size", "block_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "mamba_expand", "expand", "index_n_heads"), 2),
    "mamba_d_ssm": 64,
    "index_topk": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TWO_KINDS = {"layer_types": ["linear_attention", "full_attention"] * 2}
_LATENT = {"head_dim": None, "num_key_value_heads": 4}  # families whose heads have several sizes
_OWN = {
    **dict.fromkeys(
        ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3_text": {"layer_types": ["full_attention"] * 4},
    "cohere2": {"layer_types": ["full_attention"] * 4, "sliding_window": 8},
    "olmo3": {"layer_types": ["full_attention"] * 4, "sliding_window": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minimax": _TWO_KINDS,
    "qwen3_next": _TWO_KINDS,
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
}


def exists(family: str) -> bool:
    """Whether the installed transformers has this family as a causal language model."""
    return family in CONFIG_MAPPING and CONFIG_MAPPING[family] in MODEL_FOR_CAUSAL_LM_MAPPING


def tiny_family(family: str, **changes) -> PreTrainedModel:
    """A model with random weights, in float32 and in evaluation mode.

    The weights are large, so that a leak between rows or another order of sums shows. changes: keys of the config.
    """
    config_class = CONFIG_MAPPING[family]
    keys = {**_OWN.get(family, {}), **changes}
    known = {*config_class().to_dict(), *config_class.attribute_map}
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    config = config_class(**{key: value for key, value in {**sizes, **keys}.items() if value is not None})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model
