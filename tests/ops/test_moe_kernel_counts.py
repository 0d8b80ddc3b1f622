"""The kernels that the calls of a mixture of experts launch on a GPU. No call makes the host wait."""

import pytest
import torch
import triton_cases
from experts_cases import NAMES, ours, random_case

pytest.importorskip("triton", reason="triton is not installed")

from kernel_counts import kernels, waits

from minirl_kernels import moe_experts, moe_routing

pytestmark = triton_cases.interpreter_only()

EXPERTS_FORWARD = ["experts_sort_kernel", "experts_up_kernel", "experts_product_kernel", "experts_combine_kernel"]


def recorded_layer(ids, dtype, batch=()):
    """(ids, valid) of one layer of three, as a record of a whole model holds them."""
    experts = torch.zeros(*batch, len(ids) // (batch[0] if batch else 1), 3, ids.shape[1], dtype=dtype)
    valid = torch.zeros(experts.shape[:-1], dtype=torch.bool)
    experts[..., 1, :], valid[..., 1] = ids.view(*experts.shape[:-2], -1).to(dtype), True
    return experts[..., 1, :].flatten(0, -2), valid[..., 1].flatten()


@pytest.mark.parametrize("replayed", [None, torch.uint8, torch.uint16, torch.int64], ids=str)
def test_moe_routing(replayed):
    """Replayed ids and their mask are read where they are: no cast, no copy, no mask that is made for the call."""
    logits = triton_cases.random_logits(6, 16).requires_grad_()
    ids, valid = (None, None) if replayed is None else recorded_layer(torch.tensor([[3, 1]] * 6), replayed)

    def route():
        return moe_routing(logits, 2, routed_experts=ids, valid=valid, backend="triton")

    assert kernels(route) == ["moe_routing_fwd_kernel"]
    routing = route()
    upstream = torch.ones_like(routing.weights)
    assert kernels(lambda: torch.autograd.grad(routing.weights, logits, upstream)) == ["moe_routing_bwd_kernel"]
    assert waits(route) == []
    with torch.no_grad():
        assert kernels(route) == ["moe_routing_fwd_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
def test_moe_experts(dtype, ids_dtype):
    """The pairs are sorted once for both passes, and the weights of a router in bfloat16 are not cast."""
    (hidden, weights, experts, gate_up, down), upstream = random_case(5, 2, 4, 32, 16, dtype)
    leaves = [values.requires_grad_() for values in (hidden, weights.to(dtype), gate_up, down)]
    hidden, weights, gate_up, down = leaves

    def run():
        return moe_experts(hidden, (weights, experts), gate_up, down, backend="triton")

    experts = experts.to(ids_dtype).contiguous()
    assert kernels(run) == EXPERTS_FORWARD
    out = run()
    found = kernels(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))
    assert found == [
        "experts_activation_grad_kernel",
        "experts_product_kernel",
        "experts_combine_kernel",
        *["experts_weight_grad_kernel"] * 2,
    ]
    assert waits(lambda: torch.autograd.grad(run(), leaves, upstream)) == []
    with torch.no_grad():
        assert kernels(run) == EXPERTS_FORWARD


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_other_dtypes(dtype):
    """Equal bits to weights that were cast before, and a gradient that is rounded once."""
    (hidden, weights, experts, gate_up, down), upstream = random_case(20, 2, 4, 33, 20, torch.bfloat16)
    weights = weights.to(dtype)
    results = ours((hidden, weights, experts, gate_up, down), upstream, "triton", NAMES)
    expected = ours((hidden, weights.float(), experts, gate_up, down), upstream, "triton", NAMES)
    assert results[2].dtype == dtype
    assert all(torch.equal(values, other.to(values.dtype)) for values, other in zip(results, expected, strict=True))


@pytest.mark.parametrize("batch", [(), (2,)], ids=["packed", "padded"])
def test_the_replay_of_one_layer_of_a_record(batch):
    """Equal bits to ids and a mask in memory of their own."""
    logits = triton_cases.random_logits(6, 300)
    ids = torch.tensor([[3, 290], [255, 256], [0, 1], [299, 298], [17, 4], [128, 9]])
    layer, valid = recorded_layer(ids, torch.uint16, batch)
    valid[4] = False
    assert not valid.is_contiguous()
    assert not layer.is_contiguous()
    routing = moe_routing(logits, 2, routed_experts=layer, valid=valid, backend="triton")
    expected = moe_routing(logits, 2, routed_experts=ids, valid=valid.clone(), backend="triton")
    assert all(map(torch.equal, routing, expected))
    assert torch.equal(routing.experts[:4], ids[:4])


def test_one_expert_of_each_token_in_a_column_with_any_stride():
    logits = triton_cases.random_logits(3, 16)
    column = torch.tensor([5, 2, 9]).as_strided((3, 1), (1, 7))
    routing = moe_routing(logits, 1, routed_experts=column, backend="triton")
    assert routing.experts.tolist() == [[5], [2], [9]]
