"""The discrepancy report with vLLM as mu: aligned with the training engine, token by token and module by module."""

import json
from contextlib import contextmanager

import pytest
import torch
from minirl.cli import main
from minirl.config import ModelConfig, RolloutConfig, TaskConfig, TrainConfig, VLLMConfig
from minirl.config_file import dump_config
from minirl.discrepancy.engines import training_engine
from minirl.discrepancy.settings import EngineSettings, InferenceSettings
from minirl.discrepancy.vllm import vllm_engine
from transformers import AutoConfig, AutoModelForCausalLM
from two_engines import planted, rounded

from minirl_kernels.discrepancy import compare_engines
from minirl_kernels.discrepancy.modules import ModuleTrace
from minirl_kernels.integrations.transformers import enable_log_probs

DENSE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
MOE = {
    **DENSE,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
}
ENDS = [1]
BLOCK = 32  # tokens in a cache block, the minimum of vLLM's kernels
ARGS = {"kv_cache_memory_bytes": 64 << 20}


def prompts():
    """40 prompts of mixed lengths; most share a prefix with others."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(2, 64, (count,), generator=generator).tolist()  # noqa: E731
    prefixes = [draw(length) for length in (0, 10, BLOCK, 2 * BLOCK + 1)]
    return [prefixes[number % 4] + draw(1 + number) for number in range(40)]


PROMPTS = prompts()


def model_of(config):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**config, vocab_size=64, pad_token_id=0, eos_token_id=1)
    return enable_log_probs(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


@contextmanager
def vllm_of(model, log, dtype="float32", temperature=1.0, **args):
    vllm = VLLMConfig(separate_process=False, args=ARGS | args)
    settings = InferenceSettings(engine="vllm", dtype=dtype, vllm=vllm)
    sampling = RolloutConfig(max_new_tokens=20, temperature=temperature, batch_size=64)
    longest = max(map(len, PROMPTS))
    with vllm_engine(model, settings, sampling, ENDS, replays_routing=False, longest_prompt=longest, log=log) as engine:
        yield engine


def compared(mu, pi, dtype="float32", **options):
    return compare_engines(mu, training_engine(pi, EngineSettings(dtype=dtype), 1.0, "pi"), PROMPTS, **options)


@pytest.fixture(scope="module")
def model():
    return model_of(MOE)


@pytest.fixture(scope="module")
def mu(model, tmp_path_factory):
    """vLLM with the model's weights. A process holds one engine; tests with other engines run before or elsewhere."""
    with vllm_of(model, tmp_path_factory.mktemp("mu") / "vllm.log") as engine:
        yield engine


def test_a_dense_model_in_bfloat16(tmp_path):
    model = model_of(DENSE)
    with vllm_of(model, tmp_path / "vllm.log", dtype="bfloat16") as mu:
        report = compared(mu, model, "bfloat16")
    assert 1e-6 < report.metrics["discrepancy_kl_k3"] < 1e-2
    assert report.routing is None
    assert "without experts" in report.routing_missing
    # vLLM rounds all weights, but autocast keeps the embedding in float32
    assert report.modules.first.module == "model.embed_tokens"
    assert all(event.difference.relative < 0.05 for event in report.modules.modules)


def test_chunks_cache_hits_and_preemptions(model, tmp_path):
    """Every token is assigned to its request and place, also for chunks, cache hits and preemptions."""
    args = {
        "max_num_batched_tokens": 64,
        "block_size": BLOCK,
        "num_gpu_blocks_override": 16,
        "disable_log_stats": False,
    }
    trace = ModuleTrace(len(PROMPTS))
    pi = training_engine(model, EngineSettings(), 0.7, "pi")
    with vllm_of(model, tmp_path / "vllm.log", temperature=0.7, **args) as mu:
        with trace.recording(mu.model):
            responses, sampled = mu.generate(PROMPTS, seed=0)
        (inside,) = mu.model._llm.collective_rpc("get_model")
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in inside.modules())
        counted = {metric.name: getattr(metric, "value", 0) for metric in mu.model._llm.get_metrics()}
    assert counted["vllm:prefix_cache_hits"] > 0
    assert counted["vllm:num_preemptions"] > 0
    for response, log_probs, logits in zip(responses, sampled.log_probs, sampled.logits, strict=True):
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(log_probs.double(), expected, rtol=0, atol=2e-6)
    spans = [[0, len(prompt) + len(response) - 1] for prompt, response in zip(PROMPTS, responses, strict=True)]
    with trace.comparing(pi.model, torch.tensor(spans)):
        scored = pi.score(PROMPTS, responses, with_logits=False)
    assert (torch.cat(scored.log_probs) - torch.cat(sampled.log_probs)).abs().max() < 1e-4
    assert len(trace.events) > 50
    assert all(event.difference.relative < 1e-5 for event in trace.events)
    cached = sum(end for _, end in spans) - trace.tokens
    assert 0 < cached <= counted["vllm:prefix_cache_hits"]


def test_the_report_is_whole(model, mu):
    report = compared(mu, model, trace_sequences=6)
    assert 0 < report.metrics["log_d_abs_max"] < 1e-4
    assert report.metrics["discrepancy_kl_k3"] < 1e-9
    assert 0 < report.full_kl_max < 1e-9
    assert [layer.router for layer in report.routing] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert all(layer.equal_fraction == layer.overlap == 1 for layer in report.routing)
    assert all(event.difference.relative < 1e-5 for event in report.modules.modules)
    assert report.modules.jump.factor < 10
    without = ("act_fn", "rotary_emb", "lm_head")
    leaves = {name for name, module in model.named_modules() if name and not list(module.children())}
    blocks = {name for name, _ in model.named_modules() if name.endswith(("self_attn", "mlp"))}
    expected = {name for name in leaves | blocks if not name.endswith(without)}
    assert expected <= {event.module for event in report.modules.modules}
    assert [layer for layer, _ in report.modules.layers] == [0, 1, 2]
    assert report.modules.first.operation_missing == "operations in another process are not recorded"


def nudged(tensor):
    return tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("model.layers.1.self_attn.k_proj.weight", rounded),
        ("model.layers.0.mlp.up_proj.weight", rounded),
        ("model.layers.1.self_attn.q_norm.weight", nudged),
        ("model.layers.2.post_attention_layernorm.weight", nudged),
        ("model.layers.1.mlp.experts.down_proj", rounded),
        ("model.layers.1.mlp.gate.weight", nudged),
        ("model.norm.weight", nudged),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fault_stands_out_from_roundings(model, mu, tensor, change):
    report = compared(mu, planted(model, tensor, change))
    jump = report.modules.jump
    assert (jump.module, jump.before) == (tensor.removesuffix(".weight").removesuffix(".down_proj"), None)
    assert jump.factor > 100


def test_the_first_that_differs_is_named(model, mu):
    report = compared(mu, planted(model, "model.embed_tokens.weight", rounded))
    assert (report.modules.first.module, report.modules.first.before) == ("model.embed_tokens", None)


def test_another_attention_is_named(model, mu):
    faulty = planted(model, "model.norm.weight", lambda weight: weight)
    faulty.get_submodule("model.layers.1.self_attn").scaling *= 1.1
    jump = compared(mu, faulty).modules.jump
    assert (jump.module, jump.before) == ("model.layers.1.self_attn", "model.layers.1.self_attn.o_proj")


def test_routers_that_part(model, mu):
    faulty = planted(model, "model.layers.2.mlp.gate.weight", nudged)
    natural = compared(mu, faulty)
    before, after = natural.routing
    assert before.equal_fraction == 1
    assert after.equal_fraction < after.overlap < 1
    replayed = compared(mu, faulty, routing_replay="R3")
    assert replayed.routing[1] == after
    assert replayed.metrics["discrepancy_kl_k3"] < natural.metrics["discrepancy_kl_k3"] / 2


@pytest.fixture
def target(tmp_path):
    """Writes a config file for a model's config and dtype; returns its path."""

    def write(model, dtype, separate_process=True):
        config = TrainConfig(
            dtype=dtype,
            model=ModelConfig(config=model),
            task=TaskConfig(max_operand=29),
            rollout=RolloutConfig(engine="vllm", max_new_tokens=6, vllm=VLLMConfig(separate_process, ARGS)),
        )
        path = tmp_path / "config.toml"
        path.write_text(dump_config(config))
        return path

    return write


def test_the_command_takes_the_runs_engine(target, tmp_path, capsys):
    main(["discrepancy", str(target(MOE, "float32")), "--responses", "64", "--output", str(tmp_path)])
    table = json.loads((tmp_path / "discrepancy.json").read_text())
    assert table["mu"]["engine"] == "vllm"
    assert 0 < table["discrepancy"]["kl_full_max"] < 1e-9
    assert [layer["equal_fraction"] for layer in table["routing"]] == [1, 1]
    assert [layer["layer"] for layer in table["modules"]["layers"]] == [0, 1, 2]
    assert table["modules"]["first_difference"]["operation"] is None
    said = capsys.readouterr().out
    assert "First difference: model.layers.0" in said
    assert (tmp_path / "discrepancy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "vllm.log").is_file()


@pytest.mark.parametrize(("model", "dtype"), [(DENSE, "bfloat16"), (MOE, "float32")], ids=["dense", "moe"])
def test_batch_invariant_on_both_sides_is_zero(target, tmp_path, call_elsewhere, model, dtype):
    """Runs in another process, since the mode's replacements in a process are permanent."""
    command = ["discrepancy", str(target(model, dtype, separate_process=False)), "--responses", "64"]
    on_both = ["--mu.batch-invariant", "--pi.batch-invariant", "--fail-metric", "abs_log_d_max", "--fail-above", "0"]
    call_elsewhere(main, [*command, "--output", str(tmp_path), *on_both])
    table = json.loads((tmp_path / "discrepancy.json").read_text())
    assert table["discrepancy"]["abs_log_d_max"] == table["discrepancy"]["kl_full_max"] == 0.0
    assert table["discrepancy"]["bit_equal_fraction"] == 1.0
    assert table["modules"]["first_difference"] is None
    assert all(layer["equal_fraction"] == 1 for layer in table["routing"] or [])
