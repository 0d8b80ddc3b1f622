"""experts_implementation="minirl" against each class of experts in transformers, and in training."""

import copy
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from linear_head import assert_matrices_as_exact
from tiny_moe import CONFIGS, IS_OLDEST, count_calls, gates, gradients, tiny, token_ids
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import minirl_kernels.integrations.transformers
from minirl_kernels import moe_experts, record_routing, replay_routing

pytestmark = pytest.mark.usefixtures("cpu")

DTYPES = [torch.float32, torch.bfloat16]
TOKENS, K, E, H, I = 40, 3, 6, 24, 20
# attributes that expert classes read from their configs, under all their names
SIZES = {
    **dict.fromkeys(["hidden_size", "moe_hidden_size"], H),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size"], I),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], E),
    **dict.fromkeys(["hidden_act", "hidden_activation", "mlp_hidden_act"], "silu"),
    **dict.fromkeys(["mlp_gate_softcap", "mlp_up_softcap", "swiglu_alpha", "swiglu_limit"], 2.0),
    "moe_latent_size": None,
    "post_norm_eps": 1e-6,
}
OWN_GATE = r"gate in a way of their own \(_apply_gate\)$"
REFUSED = {
    "AriaExperts": r"store their weights transposed \(is_transposed\)$",
    "GptOssExperts": r"interleave the rows .*, store their weights transposed .*, have biases .*, " + OWN_GATE,
    "MuseSparkExperts": r"have a norm after each expert \(has_post_expert_norm\)$",
    "NemotronHExperts": r"have no gate \(has_gate\), have no gate_up_proj$",
    "OpenAIPrivacyFilterExperts": r"store their weights transposed .*, have biases \(has_bias\), " + OWN_GATE,
    "BeamExperts": OWN_GATE,
    "DeepseekV4Experts": OWN_GATE,
    "Glm5NextTextExperts": OWN_GATE,
    "HYV4Experts": OWN_GATE,
    "Inkling2Experts": OWN_GATE,
    "MiniMaxM3VLExperts": OWN_GATE,
}


def decorated_classes() -> dict[str, str]:
    """{class: module} of all expert classes in transformers that accept an implementation."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), flags=re.MULTILINE):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


WHERE = decorated_classes()


def experts_of(name, dtype=torch.float32, **changes):
    """An instance, its parameters random."""
    module = getattr(importlib.import_module(WHERE[name]), name)(SimpleNamespace(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(2 * torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return module.to(dtype)


def routed_tokens(dtype=torch.float32):
    """(hidden_states, top_k_index, top_k_weights), and the gradient of their result."""
    generator = torch.Generator().manual_seed(1)
    hidden, upstream = torch.randn(2, TOKENS, H, generator=generator).to(dtype)
    experts = torch.rand(TOKENS, E, generator=generator).argsort(-1)[:, :K]
    weights = torch.softmax(torch.randn(TOKENS, K, generator=generator), -1).to(dtype)
    return (hidden, experts, weights), upstream


def forward_backward(module, implementation, inputs, upstream):
    """(result, its gradients by hidden_states, top_k_weights and the parameters)."""
    module.config._experts_implementation = implementation
    hidden, experts, weights = inputs
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    out = module(hidden, experts, weights)
    return out.detach(), *torch.autograd.grad(out, [hidden, weights, *module.parameters()], upstream)


def loss_of(model, ids):
    """A loss for which every parameter has a gradient, in float32 or float64."""
    logits = model(ids).logits
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return log_p.gather(-1, ids.roll(-1, 1)[..., None]).mean()


@pytest.fixture
def calls(monkeypatch):
    """The number of tokens of each call of moe_experts that transformers' models make."""
    return count_calls(monkeypatch)


@pytest.mark.skipif(IS_OLDEST, reason="some came with later releases")
def test_all_that_are_refused_are_in_transformers():
    assert REFUSED.keys() <= WHERE.keys()
    assert len(WHERE) > 60


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(WHERE))
def test_what_every_class_of_experts_computes(name, dtype):
    """Each class is computed as exactly as by transformers, or refused by name."""
    module = experts_of(name, dtype)
    inputs, upstream = routed_tokens(dtype)
    if name in REFUSED:
        with pytest.raises(TypeError, match=rf"for {re.escape(WHERE[name])}\.{name}, whose experts {REFUSED[name]}"):
            forward_backward(module, "minirl", inputs, upstream)
        return
    exact_inputs = [values.double() if values.is_floating_point() else values for values in inputs]
    exact = forward_backward(copy.deepcopy(module).double(), "eager", exact_inputs, upstream.double())
    eager = forward_backward(module, "eager", inputs, upstream)
    ours = forward_backward(module, "minirl", inputs, upstream)
    for values in zip(ours, eager, exact, strict=True):
        assert_matrices_as_exact(*values)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"GptOss"}))
def test_models(name):
    """Logits, and the gradient of every parameter."""
    ids = token_ids()
    found = []
    for implementation, dtype in (("minirl", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        model = tiny(name).to(dtype)
        model.set_experts_implementation(implementation)
        found.append({"logits": model(ids).logits.detach(), **gradients(model, loss_of(model, ids))})
    ours, eager, exact = found
    assert ours.keys() == eager.keys()
    for key in ours:
        assert_matrices_as_exact(ours[key], eager[key], exact[key])


def pin_routing(model, experts):
    """Send the tokens of each layer to given experts [T, K], with weights from the current logits in their dtype."""

    def weighed(ids):
        def after(module, inputs, output):
            logits = output[0]
            chosen = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1).gather(1, ids)
            return logits, (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype), ids

        return after

    for gate, ids in zip(gates(model), experts, strict=True):
        gate.register_forward_hook(weighed(ids))


def trained(implementation, dtype, seed):
    """The change of a Qwen3-MoE's weights in 6 steps of AdamW; tokens go to the same experts in every dtype."""
    model = tiny("Qwen3Moe", seed=seed).to(dtype)
    model.set_experts_implementation(implementation)
    generator = torch.Generator().manual_seed(seed)
    pin_routing(model, [torch.rand(64, 8, generator=generator).argsort(-1)[:, :2] for _ in range(3)])
    before = [weight.detach().double().clone() for weight in model.parameters()]
    # eps is above gradients that are 0 except for rounding, since AdamW would give them full-size steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    for step in range(6):
        optimizer.zero_grad()
        (-loss_of(model, token_ids(4, 16, seed=step % 2))).backward()
        optimizer.step()
    moved = [(weight.double() - start).flatten() for weight, start in zip(model.parameters(), before, strict=True)]
    return torch.cat(moved).detach()


@functools.cache
def trained_exactly(seed):
    return trained("eager", torch.float64, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_follows_float64_as_closely_as_with_experts_of_transformers(dtype):
    """Compares averages, since the end of training with rounded weights varies by some percent between seeds."""
    distances = dict.fromkeys(("minirl", "eager", "grouped_mm"), 0.0)
    for seed in range(24):
        exact = trained_exactly(seed)
        for implementation in distances:
            off = (trained(implementation, dtype, seed) - exact).norm() / exact.norm()
            distances[implementation] += off.item() / 24
    assert distances["minirl"] <= 1.1 * min(distances["eager"], distances["grouped_mm"])
    assert distances["minirl"] < (1e-4 if dtype == torch.float32 else 0.1)


def ours_of(name="Qwen3Moe", **changes):
    model = tiny(name, **changes)
    model.set_experts_implementation("minirl")
    return model


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_hidden_states_and_routers(dtype, router_dtype):
    """The result has the dtype of the hidden states; the computation uses the dtype of the experts' weights."""
    module = experts_of("Qwen3MoeExperts", torch.bfloat16)
    (hidden, experts, weights), upstream = routed_tokens()
    inputs = (hidden.to(dtype), experts, weights.to(router_dtype))
    found = forward_backward(module, "minirl", inputs, upstream.to(dtype))
    assert [values.dtype for values in found] == [dtype, dtype, router_dtype, torch.bfloat16, torch.bfloat16]
    expected = moe_experts(hidden.bfloat16(), (inputs[2].float(), experts), module.gate_up_proj, module.down_proj)
    assert torch.equal(found[0], expected.to(dtype))


def test_under_autocast():
    module = experts_of("Qwen3MoeExperts")
    inputs, upstream = routed_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found = forward_backward(module, "minirl", inputs, upstream)
    assert [values.dtype for values in found] == [torch.float32] * 5
    hidden, experts, weights = inputs
    projections = (module.gate_up_proj.bfloat16(), module.down_proj.bfloat16())
    assert torch.equal(found[0], moe_experts(hidden.bfloat16(), (weights, experts), *projections).float())


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3"])
def test_a_record_replayed_changes_no_bit(name):
    model, ids = ours_of(name), token_ids()
    with record_routing(model) as record:
        loss = loss_of(model, ids)
        natural = gradients(model, loss)
    with replay_routing(model, record.routed_experts) as replay:
        again = loss_of(model, ids)
        replayed = gradients(model, again)
    assert torch.equal(loss, again)
    assert all(torch.equal(natural[key], replayed[key]) for key in natural)
    assert bool((replay.agreement == 1).all())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing(calls):
    model, ids = ours_of(), token_ids()
    expected = gradients(model, loss_of(model, ids))
    assert calls == [18] * 3
    model.gradient_checkpointing_enable({"use_reentrant": False})
    grads = gradients(model, loss_of(model, ids))
    assert calls == [18] * 9
    assert all(torch.equal(grads[key], expected[key]) for key in expected)


def test_generate_keeps_it(calls):
    model, prompt = ours_of().eval(), token_ids(3, 5)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = model.generate(prompt, **options)
    assert calls == [15] * 3 + [3] * 9
    model.set_experts_implementation("eager")
    assert torch.equal(ids, model.generate(prompt, **options))


def test_from_config_and_from_pretrained(tmp_path, calls):
    model, ids = ours_of().eval(), token_ids()
    with torch.no_grad():
        logits = model(ids).logits
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="minirl")
        assert torch.equal(loaded(ids).logits, logits)
        built = transformers.AutoModelForCausalLM.from_config(model.config, experts_implementation="minirl")
        built.load_state_dict(model.state_dict())
        assert torch.equal(built.eval()(ids).logits, logits)
        assert len(calls) == 9
        # the weights alone do not show this
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(stock(ids).logits, logits)
        assert len(calls) == 9


def test_compile():
    model, ids = ours_of(), token_ids()
    expected = gradients(model, loss_of(model, ids))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            grads = gradients(model, loss_of(compiled, ids))
    torch.compiler.reset()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_on_attention_and_experts():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]
    )
    ids, found = token_ids(), []
    for implementation in ("minirl", "eager"):
        model = tiny("Qwen3Moe")
        model.set_experts_implementation(implementation)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        logits = model(ids).logits.detach()
        found.append({"logits": logits, **gradients(model, loss_of(model, ids))})
    ours, eager = found
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert sum("experts" in name for name in adapters) == 3 * 2 * 2
    assert ours.keys() == eager.keys() == adapters | {"logits"}
    for key, values in ours.items():
        assert values.any()
        torch.testing.assert_close(values, eager[key])
    gpt_oss = peft.get_peft_model(ours_of("GptOss"), peft.LoraConfig(target_parameters=["gate_up_proj"]))
    with pytest.raises(TypeError, match=r"for transformers\.models\.gpt_oss\.modeling_gpt_oss\.GptOssExperts, whose"):
        gpt_oss(ids)


def test_gpt_oss_is_refused_by_name_while_its_routing_replays():
    model, ids = ours_of("GptOss"), token_ids()
    with pytest.raises(TypeError, match=r"for transformers\.models\.gpt_oss\.modeling_gpt_oss\.GptOssExperts, whose"):
        model(ids)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        with record_routing(model) as record:
            logits = model(ids).logits
        with replay_routing(model, record.routed_experts):
            assert torch.equal(model(ids).logits, logits)


def with_weight(weight):
    module = experts_of("Qwen3MoeExperts")
    module.gate_up_proj = nn.Parameter(weight, requires_grad=False)
    return module


def with_attribute(name, value):
    module = experts_of("Qwen3MoeExperts")
    setattr(module, name, value)
    return module


class Quantised(torch.Tensor):
    """A quantised tensor of another library, whose memory does not hold its values."""


UNSUPPORTED = {
    r"have the activation GELUActivation$": lambda: experts_of("Qwen3MoeExperts", hidden_act="gelu"),
    r"have the activation ReLU$": lambda: with_attribute("act_fn", nn.ReLU()),
    OWN_GATE: lambda: with_attribute("_apply_gate", lambda gate_up: gate_up.chunk(2, -1)[0]),
    r"are spread over ranks \(expert parallelism\)$": lambda: with_attribute("_is_expert_parallel", True),
    r"have no gate_up_proj$": lambda: with_attribute("gate_up_proj", None),
    r"have a gate_up_proj that is a Tensor of torch\.uint8$": lambda: with_weight(
        torch.zeros(E, 2 * I, H, dtype=torch.uint8)
    ),
    r"have a gate_up_proj that is a Quantised of torch\.float32$": lambda: with_weight(
        torch.zeros(E, 2 * I, H).as_subclass(Quantised)
    ),
}


@pytest.mark.parametrize("said", UNSUPPORTED)
def test_what_is_refused(said):
    module = UNSUPPORTED[said]()
    inputs, _ = routed_tokens()
    module.config._experts_implementation = "minirl"
    with pytest.raises(TypeError, match=rf"modeling_qwen3_moe\.Qwen3MoeExperts, whose experts {said}"):
        module(*inputs)


def test_another_name_of_silu():
    inputs, upstream = routed_tokens()
    modules = [experts_of("Qwen3MoeExperts", hidden_act=name) for name in ("silu", "swish")]
    assert type(modules[0].act_fn) is not type(modules[1].act_fn)
    for values in zip(*(forward_backward(module, "minirl", inputs, upstream) for module in modules), strict=True):
        assert torch.equal(*values)


def test_importing_the_integration_makes_the_name_known():
    assert ALL_EXPERTS_FUNCTIONS["minirl"].__module__.startswith(minirl_kernels.integrations.transformers.__name__)
