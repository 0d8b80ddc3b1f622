"""record_routing and replay_routing on routers with an adapter, a parametrization or FSDP2."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import torch.distributed as dist
from tiny_moe import gate_weights, gates, random_experts, tiny, token_ids
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from minirl_kernels import record_routing, replay_routing

# {case: (model, options of LoraConfig, last part of the adapter's names)}
ADAPTERS = {
    "the gate's weight": ("Qwen3Moe", {"target_parameters": ["mlp.gate.weight"]}),
    "gate and experts": ("Qwen3Moe", {"target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj"]}),
    "a linear layer in the gate": ("HunYuanMoEV1", {"target_modules": ["wg"]}),
    "a linear layer in the router": ("Afmoe", {"target_modules": r".*router\.gate"}),
    "the weight of a router of scores": ("Llama4", {"target_parameters": ["router.weight"]}),
}


def adapted(name, **options):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(5)
    return peft.get_peft_model(tiny(name), peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options))


def recorded(model, ids):
    with torch.no_grad(), record_routing(model) as record:
        model(ids)
    return record.routed_experts.experts


@pytest.mark.parametrize("which", ADAPTERS)
def test_a_gate_under_lora(which):
    """Routes and weights equal a gate with the adapter merged, and the adapter gets its gradient."""
    name, options = ADAPTERS[which]
    model, ids = adapted(name, **options), token_ids()
    merged = copy.deepcopy(model).merge_and_unload().train()
    for weight in gate_weights(merged):
        weight.requires_grad_(True)
    assert torch.equal(recorded(model, ids), recorded(merged, ids))
    assert not torch.equal(recorded(model, ids), recorded(tiny(name), ids))
    routed = random_experts(merged, ids.numel())
    logits = []
    for one in (model, merged):
        with replay_routing(one, routed):
            logits.append(one(ids).logits)
            logits[-1].logsumexp(-1).mean().backward()
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)
    gate = ("gate.", "wg.", "router.")
    factors = [
        [p for path, p in model.named_parameters() if f"lora_{side}" in path and any(part in path for part in gate)]
        for side in "AB"
    ]
    pairs = [
        (a, b) for a, b in zip(*factors, strict=True) if a.shape[1] == 32 and b.shape[0] == gates(merged)[0].num_experts
    ]
    assert len(pairs) == len(gates(merged))
    for (a, b), weight in zip(pairs, gate_weights(merged), strict=True):
        assert bool((a.grad != 0).any())
        torch.testing.assert_close(a.grad, 2 * b.detach().T @ weight.grad, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(b.grad, 2 * weight.grad @ a.detach().T, rtol=1e-3, atol=1e-7)


def test_a_gate_that_is_trained_whole_beside_adapters():
    model, ids = adapted("Qwen3Moe", target_modules=["q_proj"], modules_to_save=["gate"]), token_ids()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(recorded(model, ids), recorded(merged, ids))
    with replay_routing(model, random_experts(merged, ids.numel())):
        model(ids).logits.logsumexp(-1).mean().backward()
    trained = [p for name, p in model.named_parameters() if "gate.modules_to_save" in name]
    assert len(trained) == 3
    assert all(bool((p.grad != 0).any()) for p in trained)
    # the adapter is disabled inside the context, as for a reference policy
    with torch.no_grad(), record_routing(model) as record, model.disable_adapter():
        model(ids)
    assert torch.equal(record.routed_experts.experts, recorded(tiny("Qwen3Moe"), ids))


def test_a_gate_with_a_parametrization():
    class Doubled(torch.nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, doubled, ids = tiny("Qwen3Moe"), tiny("Qwen3Moe"), token_ids()
    routed = random_experts(model, ids.numel())
    with torch.no_grad():
        for gate, other in zip(gates(model), gates(doubled), strict=True):
            other.weight.mul_(2)
            parametrize.register_parametrization(gate, "weight", Doubled())
    with torch.no_grad(), replay_routing(model, routed):
        logits = model(ids).logits
    with torch.no_grad(), replay_routing(doubled, routed):
        assert torch.equal(doubled(ids).logits, logits)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shards_gates", [False, True], ids=["layers", "gates too"])
@pytest.mark.usefixtures("process_group")
def test_a_sharded_model(shards_gates):
    """FSDP2 replaces the class of each sharded module, also of the router."""
    plain, model, ids = tiny("Qwen3Moe"), tiny("Qwen3Moe"), token_ids()
    routed = random_experts(plain, ids.numel())
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        if shards_gates:
            fully_shard(layer.mlp.gate, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad(), replay_routing(plain, routed):
        logits = plain(ids).logits
    with torch.no_grad(), replay_routing(model, routed):
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(recorded(model, ids), recorded(plain, ids))


@pytest.mark.parametrize("wrapper", [DistributedDataParallel, FullyShardedDataParallel])
@pytest.mark.usefixtures("process_group")
def test_a_model_in_a_wrapper(wrapper):
    """The context takes the wrapped model or the model inside; FSDP1 also wraps each layer."""
    plain, model, ids = tiny("Qwen3Moe"), tiny("Qwen3Moe"), token_ids()
    routed = random_experts(plain, ids.numel())
    expected = recorded(plain, ids)
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    if wrapper is FullyShardedDataParallel:
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = wrapper(layer, **options)
    wrapped = wrapper(model, **(options if wrapper is FullyShardedDataParallel else {}))
    with replay_routing(plain, routed):
        logits = plain(ids).logits
    for handed in (wrapped, model):
        with replay_routing(handed, routed):
            assert torch.equal(wrapped(ids).logits, logits)
    assert torch.equal(recorded(wrapped, ids), expected)
