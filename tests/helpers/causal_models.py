"""Small causal language models of many families, built from their configs."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

V = 37
COMMON = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that no two tokens are equally likely
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
# the families differ in the steps between the last layer and the logits
FAMILIES = {
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": 2},  # tied embeddings
    "phi": {},  # a bias
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},  # a divisor
    "hyperclovax": {"logits_scaling": 0.3},  # a factor, although it has the same name
    "falcon_h1": {"lm_head_multiplier": 0.3, **MAMBA},
    "minicpm3": {"dim_model_base": 8, **LATENT, "head_dim": 8, "num_key_value_heads": 2},  # a factor before the head
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},  # a layer before the head, and a bias
}


def make(kind, **changes):
    config = CONFIG_MAPPING[kind](**{**COMMON, **FAMILIES[kind], **changes})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        # grouped_mm, the default of mixture-of-experts models, does not support float64
        options = {"experts_implementation": "eager"} if "num_experts" in FAMILIES[kind] else {}
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
