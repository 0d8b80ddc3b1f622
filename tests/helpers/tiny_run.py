"""A training run of seconds: a two-layer mixture of experts with a few thousand weights, on sums up to 29."""

from minirl.config import (
    ColdStartConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)

TINY_MODEL = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "initializer_range": 0.3,  # so that no two tokens are equally likely
}


def tiny_run(run_dir) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        steps=2,
        prompts_per_minibatch=3,
        num_minibatches=2,
        micro_batch_size=8,
        model=ModelConfig(config=TINY_MODEL),
        task=TaskConfig(max_operand=29),
        cold_start=ColdStartConfig(steps=2, batch_size=8, check_every=1),
        rollout=RolloutConfig(group_size=4, max_new_tokens=6, batch_size=16),
        optimizer=OptimizerConfig(lr=1e-2),
        eval=EvalConfig(every=1, k=2, prompts=6),
    )
