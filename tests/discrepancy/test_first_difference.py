"""A planted fault is found in its place, and without a fault nothing is reported."""

from contextlib import contextmanager

import pytest
import torch
from tiny_moe import COMMON
from transformers import Qwen3Config, Qwen3ForCausalLM
from two_engines import PROMPTS, compared, model_of, planted, rounded

from minirl_kernels.discrepancy.modules import ModuleTrace
from minirl_kernels.discrepancy.report import LOG_PROBS
from minirl_kernels.integrations.transformers import enable_log_probs


def nudged(tensor):
    return tensor + 0.5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))


# (model, tensor, its change, expected module, expected operation)
FAULTS = [
    ("Qwen3Moe", "model.embed_tokens.weight", rounded, "model.embed_tokens", "aten.embedding"),
    ("Qwen3Moe", "model.layers.1.self_attn.q_proj.weight", rounded, "model.layers.1.self_attn.q_proj", "aten.mm"),
    ("Qwen3Moe", "model.layers.2.mlp.experts.down_proj", rounded, "model.layers.2.mlp.experts", "aten._grouped_mm"),
    ("Qwen3Moe", "model.layers.1.mlp.gate.weight", nudged, "model.layers.1.mlp.gate", "aten.mm"),
    ("Qwen3Moe", "model.layers.2.post_attention_layernorm.weight", nudged, "model.layers.2.post_attention_layernorm",
     "aten.mul"),
    ("Qwen3Moe", "model.norm.weight", nudged, "model.norm", "aten.mul"),
    ("DeepseekV3", "model.layers.2.mlp.gate.e_score_correction_bias", nudged, "model.layers.2.mlp.gate", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tensor", "change", "module", "operation"), FAULTS, ids=[fault[1] for fault in FAULTS]
)
def test_a_planted_fault_is_named(name, tensor, change, module, operation):
    model = model_of(name)
    report = compared(planted(model, tensor, change), model)
    first = report.modules.first
    assert (first.module, first.before) == (module, None)
    assert first.layer == (int(module.split(".")[2]) if "layers" in module else None)
    assert 0 < first.difference.differing_fraction <= 1
    if operation is not None:
        assert any(ran.startswith(operation) for ran in first.operation.mu)
        assert first.operation.mu == first.operation.pi
    layers = dict(report.modules.layers)
    assert list(layers) == [0, 1, 2]
    first_reached = {"model.embed_tokens": 0, "model.norm": 3}.get(module, first.layer)
    for layer, difference in layers.items():
        assert difference.is_none == (layer < first_reached)
    assert report.metrics["discrepancy_kl_k3"] > 0


def test_a_fault_in_the_head():
    model = model_of("Qwen3Moe")
    report = compared(planted(model, "lm_head.weight", rounded), model)
    assert report.modules.first.module == LOG_PROBS
    assert all(event.difference.is_none for event in report.modules.modules)
    assert report.metrics["discrepancy_kl_k3"] > 0


@pytest.mark.parametrize(("name", "tensor"), [fault[:2] for fault in FAULTS if "gate" in fault[1]])
def test_a_router_that_is_nudged_parts_at_its_layer(name, tensor):
    model = model_of(name)
    report = compared(planted(model, tensor, nudged), model)
    layer = int(tensor.split(".")[2])
    agreement = {int(one.router.split(".")[2]): one for one in report.routing}
    for number, one in agreement.items():
        if number < layer:
            assert (one.equal_fraction, one.overlap) == (1, 1)
    assert agreement[layer].equal_fraction < agreement[layer].overlap < 1


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3", "Mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_engines_have_no_difference(name, dtype):
    model = model_of(name)
    report = compared(model, model, mu_settings={"dtype": dtype}, pi_settings={"dtype": dtype}, batch_size=4)
    for key in ("discrepancy_kl_k1", "discrepancy_kl_k3", "log_d_abs_max", "truncation_fraction", "clip_fraction_low"):
        assert report.metrics[key] == 0.0
    assert set(report.metrics["log_d_abs_quantiles"].values()) == {0.0}
    assert (report.metrics["bit_equal_fraction"], report.metrics["ess"]) == (1.0, 1.0)
    assert report.full_kl_mean == report.full_kl_max == 0.0
    assert report.modules.first is None
    assert all(event.difference.relative == 0.0 for event in report.modules.modules)
    assert all((one.equal_fraction, one.overlap) == (1, 1) for one in report.routing)


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3"])
def test_a_decode_is_aligned_with_whole_sequences(name):
    """A wrong alignment of tokens would give differences as large as the values."""
    model = model_of(name)
    report = compared(model, model, mu_settings={"decode": True}, trace_sequences=6)
    assert report.metrics["log_d_abs_max"] < 1e-4
    assert report.full_kl_max < 1e-8
    assert all(event.difference.relative < 1e-5 for event in report.modules.modules)
    compared_names = {event.module for event in report.modules.modules}
    leaves = {
        name for name, module in model.named_modules()
        if not list(module.children())
        # training computes no logits, and DeepSeek's kv_b_proj covers all keys in each step
        and not name.endswith(("act_fn", "lm_head", "kv_b_proj"))
    }  # fmt: skip
    assert leaves <= compared_names
    assert {f"model.layers.{layer}" for layer in range(3)} <= compared_names
    expected = sum(map(len, PROMPTS)) + report.metrics["num_tokens"] - len(PROMPTS)
    assert report.modules.tokens == expected
    assert report.metrics["num_tokens"] < 7 * len(PROMPTS)  # some ended early


def test_a_fault_stands_out_from_the_roundings_of_a_decode():
    model = model_of("Qwen3Moe")
    faulty = planted(model, "model.layers.1.self_attn.v_proj.weight", rounded)
    layers = dict(compared(faulty, model, mu_settings={"decode": True}).modules.layers)
    assert layers[0].relative < 1e-5
    assert layers[1].relative > 100 * layers[0].relative


# a correction bias changes the experts but not the logits, which give a router's relative difference
GROWING = [fault[:4] for fault in FAULTS if "layers" in fault[1] and "bias" not in fault[1]]


@pytest.mark.parametrize(("name", "tensor", "change", "module"), GROWING, ids=[fault[1] for fault in GROWING])
def test_a_fault_is_where_a_decodes_roundings_grow_most(name, tensor, change, module):
    model = model_of(name)
    jump = compared(planted(model, tensor, change), model, mu_settings={"decode": True}).modules.jump
    assert (jump.module, jump.before) == (module, None)
    assert jump.factor > 100
    assert compared(model, model, mu_settings={"decode": True}).modules.jump.factor < 10


def test_another_attention_is_named_by_what_it_runs():
    model = model_of("Qwen3Moe")
    report = compared(model, model, pi_settings={"attn_implementation": "eager"})
    first = report.modules.first
    assert (first.module, first.before) == ("model.layers.0.self_attn", "model.layers.0.self_attn.o_proj")
    assert any("scaled_dot_product" in ran for ran in first.operation.mu)
    assert any("softmax" in ran for ran in first.operation.pi)


def test_other_experts_are_named():
    model = model_of("Qwen3Moe")
    first = compared(model, model, pi_settings={"experts_implementation": "minirl"}).modules.first
    assert first.module == "model.layers.0.mlp.experts"
    assert any(ran.startswith("aten._grouped_mm") for ran in first.operation.mu)
    assert first.operation.pi[-1] == "minirl_kernels.moe_experts.default float32"


def test_another_dtype_is_named_at_the_first_matmul():
    model = model_of("Qwen3Moe")
    first = compared(model, model, mu_settings={"dtype": "bfloat16"}).modules.first
    assert first.module == "model.layers.0.self_attn.q_proj"
    assert first.operation.name is None
    assert first.operation.mu[-1] != first.operation.pi[-1]


def test_quantization_is_named_at_the_first_layer_that_it_rounds():
    model = model_of("Qwen3Moe")
    report = compared(model, model, mu_settings={"quantization": "e4m3"})
    assert report.modules.first.module == "model.layers.0.self_attn.q_proj"
    assert any("float8_e4m3fn" in ran for ran in report.modules.first.operation.mu)


class Opaque:
    """An engine without access to its model."""

    model = None

    def __init__(self, engine):
        self.generate, self.score = getattr(engine, "generate", None), getattr(engine, "score", None)


class Remote:
    """An engine that records its modules like a model in another process."""

    def __init__(self, engine):
        self._engine = engine
        self.model, self.generate = self, engine.generate

    @contextmanager
    def recording(self, rows):
        trace = ModuleTrace(rows)
        with trace.recording(self._engine.model):
            yield trace._places


def remote_mu(engine):
    return Remote(engine) if hasattr(engine, "generate") else engine


def test_a_model_that_is_recorded_elsewhere():
    model = model_of("Qwen3Moe")
    faulty = planted(model, "model.layers.1.self_attn.q_proj.weight", rounded)
    options = {"mu_settings": {"decode": True}, "routing_replay": "R3"}
    watched = compared(faulty, model, **options)
    report = compared(faulty, model, **options, wrap=remote_mu)
    assert report.metrics == watched.metrics
    assert report.routing == watched.routing
    assert report.modules.modules == watched.modules.modules
    assert report.modules.jump == watched.modules.jump
    assert report.modules.tokens == watched.modules.tokens
    first = report.modules.first
    assert (first.module, first.before) == (watched.modules.first.module, watched.modules.first.before)
    assert first.operation is None
    assert first.operation_missing == "operations in another process are not recorded"


def test_a_model_elsewhere_that_tells_no_experts():
    model = model_of("Qwen3Moe")
    report = compared(model, model, wrap=remote_mu)
    assert report.routing is None
    assert report.routing_missing == "mu gives no access to its model here, and returned no routed_experts"
    assert report.modules.first is None


def test_engines_without_a_model_to_look_into():
    model = model_of("Qwen3Moe")
    report = compared(model, model, wrap=Opaque)
    assert report.modules is None
    assert report.routing is None
    assert report.routing_missing == report.modules_missing == "an engine gives no access to its model"
    assert report.metrics["discrepancy_kl_k3"] == report.full_kl_mean == 0.0


def test_hooks_are_gone_afterwards():
    model = model_of("Qwen3Moe")
    before = [{**module._forward_pre_hooks, **module._forward_hooks} for module in model.modules()]
    compared(model, model, mu_settings={"decode": True})
    assert [{**module._forward_pre_hooks, **module._forward_hooks} for module in model.modules()] == before


def test_without_a_trace():
    model = model_of("Qwen3Moe")
    report = compared(model, model, trace_sequences=0)
    assert report.modules is None
    assert "trace_sequences is 0" in report.modules_missing
    assert report.routing is not None


def test_a_dense_model_has_no_routing():
    torch.manual_seed(0)
    config = Qwen3Config(**{**COMMON, "head_dim": 8})
    model = enable_log_probs(Qwen3ForCausalLM(config).eval())
    report = compared(planted(model, "model.layers.1.mlp.up_proj.weight", rounded), model)
    assert report.modules.first.module == "model.layers.1.mlp.up_proj"
    assert report.routing is None
    assert "without experts" in report.routing_missing
