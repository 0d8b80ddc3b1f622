"""Prompts and responses that a model's context cannot hold are refused before anything is sampled."""

from dataclasses import replace

import pytest
from command import fails
from minirl import run as run_module
from minirl.config import ColdStartConfig, EvalConfig, ModelConfig, RolloutConfig, TaskConfig, VLLMConfig
from minirl.config_file import dump_config, load_config
from minirl.context import check_problems, context_length
from minirl.errors import MiniRLError
from minirl.models import make_model
from minirl.tasks import Problem
from tiny_run import TINY_MODEL
from transformers import CONFIG_MAPPING

LEARNED = {
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 11},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 11,
    },
}
MODELS = {
    **{name: {"model_type": name, **sizes} for name, sizes in LEARNED.items()},
    "qwen3_moe": {**TINY_MODEL, "max_position_embeddings": 11},
}


@pytest.fixture
def nothing_is_sampled(monkeypatch):
    def sampled(*_):
        raise AssertionError("the rollout engine was made")

    monkeypatch.setattr(run_module, "make_sampler", sampled)


@pytest.mark.parametrize("name", MODELS)
def test_a_response_beyond_the_context_is_refused_before_the_first_rollout(
    config_file, capsys, nothing_is_sampled, name
):
    """Sums of numbers up to 29 have prompts of up to 6 tokens."""
    path = config_file(model=ModelConfig(config=MODELS[name]))
    said = fails(capsys, "train", path)
    assert (
        "rollout.max_new_tokens is 6 and the longest prompt has 6 tokens, together 12: they must be at most 11, the "
        f"context of this {name} model"
    ) in said


@pytest.mark.parametrize("name", MODELS)
def test_a_response_that_just_fits_is_sampled_and_learnt_from(config, make_trainer, name):
    """Every response has the maximum length after the longest prompt, since no token ends it."""
    keys = {key: 12 if value == 11 else value for key, value in MODELS[name].items()}
    trainer = make_trainer(config, model=ModelConfig(config=keys))
    check_problems(trainer.config, trainer.model, trainer.sampler.tokenizer, trainer.sampler.task.train)
    trainer.sampler.engine._eos_token_ids = []
    trainer.problems.take = lambda start, count: [Problem("12+34=", "46")] * count
    assert trainer.step(1)["cut_off_fraction"] == 1.0


def test_eval_and_discrepancy(run_folder, capsys):
    text = (run_folder / "config.toml").read_text()
    (run_folder / "config.toml").write_text(text.replace("max_new_tokens = 6", "max_new_tokens = 40000"))
    assert "rollout.max_new_tokens is 40000 and the longest prompt has" in fails(capsys, "eval", run_folder)
    said = fails(capsys, "discrepancy", run_folder)
    assert "--max-new-tokens is 40000 and the longest prompt has 6 tokens, together 40006" in said
    said = fails(capsys, "discrepancy", run_folder, "--max-new-tokens", 32763)
    assert "they must be at most 32768, the context of this qwen3_moe model" in said


def test_the_context_of_the_model_that_staleness_is_measured_with(run_folder, config, tmp_path, capsys):
    model, tokenizer = make_model(replace(config, model=ModelConfig(config=MODELS["qwen3_moe"])))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "updated")
    said = fails(capsys, "discrepancy", run_folder, "--updated-model", tmp_path / "updated")
    assert "they must be at most 11, the context of this qwen3_moe model" in said


def test_a_cold_start_that_reads_beyond_the_context(config, tmp_path, finished_run, capsys):
    """An answer may be longer than a response."""
    path, file = tmp_path / "config.toml", tmp_path / "problems.jsonl"
    file.write_text("\n".join(f'{{"prompt": "{n}+1=", "answer": "{10**38 + n}"}}' for n in range(40)))
    model, tokenizer = make_model(
        replace(config, model=ModelConfig(config={**TINY_MODEL, "max_position_embeddings": 42}))
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    changed = replace(
        config,
        model=ModelConfig(path=str(tmp_path / "model")),
        task=TaskConfig(kind="jsonl", path=str(file)),
        eval=EvalConfig(k=1, prompts=2),
    )
    path.write_text(dump_config(changed))
    said = fails(capsys, "train", path)
    assert (
        "the longest problem has 45 tokens with its answer and the end of sequence: they must be at most 42, the "
        "context of this qwen3_moe model, or cold_start.steps must be 0"
    ) in said
    without = replace(load_config(path), cold_start=ColdStartConfig())
    check_problems(without, model, tokenizer, [Problem("1+1=", str(10**38))])


def test_vllm_is_told_less_than_the_model_has(config):
    model, tokenizer = make_model(config)
    rollout = RolloutConfig(engine="vllm", max_new_tokens=6, vllm=VLLMConfig(args={"max_model_len": 11}))
    with pytest.raises(MiniRLError, match=r"together 12: they must be at most 11, rollout\.vllm\.args\.max_model_len"):
        check_problems(replace(config, rollout=rollout), model, tokenizer, [Problem("12+34=", "46")])


@pytest.mark.parametrize(
    ("model_type", "keys", "length"),
    [
        ("gpt2", {"n_positions": 64}, 64),
        ("mpt", {"max_seq_len": 64}, 64),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("mistral", {"max_position_embeddings": 64, "sliding_window": 16}, 64),  # a window is no limit
        ("llama", {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 256),
        (
            "qwen3",
            {
                "max_position_embeddings": 96,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            },
            256,
        ),
        (
            "gemma3_text",
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            512,
        ),
        (
            "llama",  # llama3 scaling: max_position_embeddings is already the extended length
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8,
                    "rope_theta": 1e4,
                },
            },
            64,
        ),
    ],
)
def test_context_length(model_type, keys, length):
    assert context_length(CONFIG_MAPPING[model_type](**keys)) == length
