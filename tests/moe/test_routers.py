"""moe_routing computes the same as each router class of transformers, and unknown classes are refused."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from policy_batches import assert_as_exact_as_eager
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from tiny_moe import CONFIGS, IS_OLDEST, tiny

from minirl_kernels import moe_layer_indices, moe_routing, record_routing
from minirl_kernels.moe.routers import _KINDS, Router, routers
from minirl_kernels.ops.moe_routing import Routing
from minirl_kernels.ops.moe_routing.reference import moe_routing_reference
from minirl_kernels.versions import OLDEST_TRANSFORMERS

SOURCES = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
WHERE = {
    name: f"transformers.models.{path.parent.name}.{path.stem}"
    for path in SOURCES
    for name in _KINDS
    if f"\nclass {name}(" in path.read_text()
}
# return their parts in another order there
OTHERWISE_IN_THE_OLDEST = {
    "AriaTextTopKRouter",
    "GraniteMoeHybridTopKRouter",
    "GraniteMoeSWATopKRouter",
    "GraniteMoeSharedTopKRouter",
    "GraniteMoeTopKRouter",
}
GIVEN_THE_BIAS = {"AfmoeTokenChoiceRouter", "HYV3TopKRouter", "MiniMaxM2TopKRouter"}


def router_of(name, norm_topk_prob=True):
    """An instance of the class with the attributes that its forward reads, and no config."""
    generator = torch.Generator().manual_seed(0)
    home = importlib.import_module(WHERE[name])
    cls = getattr(home, name)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    weight = torch.randn(24, 16, generator=generator) / 2
    if name in ("AfmoeTokenChoiceRouter", "HunYuanMoEV1Gate"):
        module.gate = module.wg = nn.Linear(16, 24, bias=False)
        module.gate.weight = nn.Parameter(weight)
    else:
        module.weight = nn.Parameter(weight)
    module.bias = nn.Parameter(torch.randn(24, generator=generator))
    module.e_score_correction_bias = torch.randn(24, generator=generator) / 8
    if name.startswith("Ernie4_5"):
        statics = getattr(home, name.replace("TopKRouter", "Statics"))
        module.moe_statics = statics(SimpleNamespace(moe_num_experts=24, num_experts=24))
        module.moe_statics.e_score_correction_bias.data.copy_(module.e_score_correction_bias[None] / 8)
        module.norm_min = 1e-12
    module.hidden_dim, module.num_experts, module.top_k = 16, 24, 5
    module.num_group, module.topk_group, module.topk_method = 4, 2, "greedy"
    module.routed_scaling_factor = module.router_scaling_factor = module.route_scale = 2.5
    module.norm_topk_prob = norm_topk_prob
    return Router(name, (module,))


def inputs_of(router, dtype, tokens=60):
    hidden = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden = hidden[None] if router.name == "AfmoeTokenChoiceRouter" else hidden
    return (hidden, router.modules[0].e_score_correction_bias) if router.name in GIVEN_THE_BIAS else (hidden,)


@pytest.mark.skipif(IS_OLDEST, reason="some routers came with later releases")
def test_every_class_of_the_table_is_in_transformers():
    assert sorted(WHERE) == sorted(_KINDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", sorted(WHERE))
def test_what_a_router_computes(name, norm, dtype):
    """Compares natural experts, weights (as exact as the router's own), and gradients of the router's parameters."""
    if IS_OLDEST and name in OTHERWISE_IN_THE_OLDEST:
        pytest.skip("returns another form, which is refused")
    router = router_of(name, norm)
    (module,) = router.modules
    inputs = inputs_of(router, dtype)
    output = module.to(dtype)(*inputs)
    logits, experts, options = router.logits(output), router.experts(output), router.options(module, inputs)
    routing = moe_routing(logits, router.top_k, routed_experts=experts, **options)
    exact = moe_routing_reference(
        logits.double(), router.top_k, experts, **{"num_groups": 1, "top_k_groups": 1, **options}
    )
    ours = router.replaced(output, routing)
    best = router.replaced(tuple(part.double() for part in output), Routing(*exact))
    assert [(part.dtype, part.shape) for part in ours] == [(part.dtype, part.shape) for part in output]
    for mine, its, right in zip(ours, output, best, strict=True):
        if mine.is_floating_point():
            assert_as_exact_as_eager(mine, its, right)
        else:
            assert torch.equal(mine, its)
    assert torch.equal(router.experts(ours).sort().values, experts.sort().values)
    clear = exact[-1] > 1e-4  # without ties, which transformers breaks differently
    assert clear.float().mean() > 0.5
    assert torch.equal(routing.agreement[clear], torch.ones(int(clear.sum())))
    if dtype == torch.float32:
        generator = torch.Generator().manual_seed(2)
        place = 1 if len(output) == 3 else 0
        upstream = torch.randn(output[place].shape, generator=generator)
        weight = next(parameter for parameter in module.parameters() if parameter.shape == (24, 16))
        grads = [torch.autograd.grad(parts[place], weight, upstream, retain_graph=True)[0] for parts in (ours, output)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "returned"),
    [
        (lambda logits, weights, experts: logits, r"torch\.float32 \[60, 24\]"),
        (lambda logits, weights, experts: (logits, experts, weights), "torch.float32.*torch.int64.*torch.float32"),
        (lambda logits, weights, experts: (experts, weights, logits), "torch.int64.*torch.float32.*torch.float32"),
    ],
    ids=["logits alone", "experts before weights", "reversed"],
)
def test_a_router_that_returns_another_form_is_named(change, returned):
    """Older releases of transformers return other forms."""
    router = router_of("Qwen3MoeTopKRouter")
    output = change(*router.modules[0](*inputs_of(router, torch.float32)))
    for read in (router.logits, router.experts):
        with pytest.raises(TypeError, match=rf"^Qwen3MoeTopKRouter .* returns {returned}.*: it must return \(logits"):
            read(output)


def test_a_transformers_whose_routers_return_probabilities(monkeypatch):
    """Old routers return probabilities; a second softmax would change the model's logits."""
    model = tiny("Qwen3Moe")
    monkeypatch.setattr("transformers.__version__", "5.5.4")
    with (
        pytest.raises(ImportError, match=rf"^transformers is 5\.5\.4: it must be {OLDEST_TRANSFORMERS} or later"),
        record_routing(model),
    ):
        pass


def test_configurations_that_replay_would_weigh_otherwise():
    router = router_of("DeepseekV2TopkRouter")
    router.modules[0].topk_method = "group_limited_greedy"
    with pytest.raises(ValueError, match="topk_method is 'group_limited_greedy': it must be 'greedy'"):
        router.options(router.modules[0], ())
    router = router_of("Ernie4_5_MoeTopKRouter")
    router.modules[0].norm_min = 0.1
    with pytest.raises(ValueError, match=r"moe_norm_min is 0\.1: it must be at most"):
        router.options(router.modules[0], ())


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_of_a_model(name):
    model = tiny(name)
    names = [router.name for router in routers(model)]
    first = 1 if name in ("DeepseekV3", "Glm4Moe") else 0  # the first layer of these is dense
    child = "router" if name == "GptOss" else "gate"
    assert names == [f"model.layers.{layer}.mlp.{child}" for layer in range(first, 3)]
    assert moe_layer_indices(model) == list(range(first, 3))


class OtherRouter(nn.Linear):
    pass


def test_a_router_that_cannot_be_replayed_is_named():
    model = tiny("Qwen3Moe")
    model.model.layers[1].mlp.gate = OtherRouter(32, 8)
    with (
        pytest.raises(
            ValueError, match=r"^model has experts in model\.layers\.1\.mlp .*: its children are .*gate \(OtherRouter\)"
        ),
        record_routing(model),
    ):
        pass


def test_a_subclass_of_a_router_is_another_router():
    model = tiny("Qwen3Moe")
    gate = model.model.layers[1].mlp.gate
    gate.__class__ = type("Noisy", (type(gate),), {})
    with pytest.raises(ValueError, match=r"gate \(Noisy\)"):
        routers(model)


def test_a_model_without_experts():
    with pytest.raises(ValueError, match="model is a Linear without experts: it must have routers"):
        routers(nn.Linear(3, 3))
