"""Tiny models of transformers, dense and with experts, one for each way of encoding positions."""

import torch
import transformers
from tiny_moe import tiny

COMMON = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
HEADS = {"hidden_size": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.2}
CONFIGS = {
    "Llama": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "GPTJ": {**GPT, "rotary_dim": 4},  # rotary; its layers are named h
    "GPT2": GPT,  # learned positions
    "OPT": {  # learned positions, computed from the mask
        **{key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        "ffn_dim": 48,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
    },
    "Bloom": HEADS,  # alibi: it takes no position_ids
    "XGLM": {  # sinusoidal positions
        "d_model": 32,
        "ffn_dim": 48,
        "num_layers": 3,
        "attention_heads": 4,
        "max_position_embeddings": 64,
        "init_std": 0.2,
    },
    "Mamba": MAMBA,  # no positions, and decoding without a mask
}


def family(name):
    """`<name>ForCausalLM` in float32, in evaluation mode, with weights large enough to tell its tokens apart."""
    if name not in CONFIGS:
        return tiny(name, initializer_range=0.2).eval()
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **CONFIGS[name])
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
