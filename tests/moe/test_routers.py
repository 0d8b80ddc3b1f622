"""moe_routing computes what transformers' own routers do, class by class, and refuses those that it does not know."""

import importlib
from pathlib import Path

import pytest
import torch
from helpers import assert_as_exact_as_eager
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from tiny_moe import CONFIGS, tiny

from minirl_kernels import moe_layer_indices, moe_routing, record_routing
from minirl_kernels.moe.routers import _OPTIONS, Router, routers
from minirl_kernels.ops.moe_routing.reference import moe_routing_reference

SOURCES = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
WHERE = {
    name: f"transformers.models.{path.parent.name}.{path.stem}"
    for path in SOURCES
    for name in _OPTIONS
    if f"\nclass {name}(" in path.read_text()
}


def router_of(name, norm_topk_prob=True):
    """An instance of the class with the attributes that its forward reads, and no config."""
    generator = torch.Generator().manual_seed(0)
    cls = getattr(importlib.import_module(WHERE[name]), name)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module.weight = nn.Parameter(torch.randn(24, 16, generator=generator) / 2)
    module.bias = nn.Parameter(torch.randn(24, generator=generator))
    module.e_score_correction_bias = torch.randn(24, generator=generator) / 8
    module.hidden_dim, module.num_experts, module.top_k = 16, 24, 5
    module.num_group, module.topk_group, module.routed_scaling_factor = 4, 2, 2.5
    module.norm_topk_prob = norm_topk_prob
    return Router(name, module)


def test_every_class_of_the_table_is_in_transformers():
    assert sorted(WHERE) == sorted(_OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("name", sorted(_OPTIONS))
def test_what_a_router_computes(name, norm, dtype):
    """Its natural experts; at them its weights, as exact as it is itself; and the gradient of its parameters."""
    router = router_of(name, norm)
    router.module.to(dtype)
    hidden = torch.randn(60, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits, weights, experts = router.module(hidden)
    ours = moe_routing(logits, router.top_k, routed_experts=experts, **router.options())
    options = {"num_groups": 1, "top_k_groups": 1, **router.options()}
    exact = moe_routing_reference(logits.double(), router.top_k, experts, **options)
    assert_as_exact_as_eager(ours.weights.to(weights.dtype), weights, exact[0])
    clear = exact[-1] > 1e-4  # transformers decides ties by its topk
    assert clear.float().mean() > 0.5
    assert torch.equal(ours.agreement[clear], torch.ones(int(clear.sum())))
    if dtype == torch.float32:
        upstream = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
        grads = [
            torch.autograd.grad(w, router.module.weight, upstream, retain_graph=True)[0]
            for w in (ours.weights, weights)
        ]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_of_a_model(name):
    model = tiny(name)
    names = [router.name for router in routers(model)]
    first = 1 if name in ("DeepseekV3", "Glm4Moe") else 0  # whose first layer is dense
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
