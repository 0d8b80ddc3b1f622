"""The Triton kernels of moe_routing on a GPU: the interpreter's checks, and checks that need hardware."""

import itertools

import pytest
import torch
from cuda_graphs import captured
from dtypes import DTYPES
from routing_cases import KINDS, check_moe_routing, forward_backward, random_experts
from triton_cases import random_logits

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (67, 13), (128, 8), (512, 10), (4096, 64)])
def test_any_number_of_experts(num_experts, top_k, dtype):
    logits, experts = random_logits(40, num_experts, dtype=dtype), random_experts(40, num_experts, top_k)
    for (scoring, norm), replayed in itertools.product(KINDS, (None, experts)):
        check_moe_routing(
            logits, top_k, device=DEVICE, routed_experts=replayed, norm_topk_prob=norm, scoring=scoring, scale=1.7
        )


@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (8, 4), (4, 2)])
def test_bias_and_groups(num_groups, top_k_groups):
    bias = torch.randn(256, generator=torch.Generator().manual_seed(2)) / 8
    check_moe_routing(
        random_logits(40, 256),
        8,
        device=DEVICE,
        scoring="sigmoid",
        correction_bias=bias,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scoring", "norm"), KINDS)
def test_replaying_the_natural_experts_changes_no_bit(scoring, norm, dtype):
    logits = random_logits(3000, 128, dtype=dtype).to(DEVICE)
    options = {"scoring": scoring, "norm_topk_prob": norm}
    natural, grad = forward_backward(logits, 8, **options)
    for ids_dtype in (torch.uint8, torch.uint16, torch.int64):
        replayed, replayed_grad = forward_backward(logits, 8, routed_experts=natural.experts.to(ids_dtype), **options)
        assert all(map(torch.equal, (*replayed, replayed_grad), (*natural, grad)))


@pytest.mark.parametrize("bad", [[3, 20, 1], [3, -1, 5], [3, 2**40, 1], [7, 3, 7]], ids=str)
def test_a_bad_row_is_nan_or_raises(bad):
    logits, experts = random_logits(4, 20).to(DEVICE), random_experts(4, 20, 3).to(DEVICE)
    expected, expected_grad = forward_backward(logits, 3, routed_experts=experts)
    experts[1] = torch.tensor(bad)
    routing, grad = forward_backward(logits, 3, routed_experts=experts)
    assert all(values[1].isnan().all() for values in (routing.weights, routing.agreement, routing.mass))
    assert torch.equal(routing.experts[1], routing.natural_experts[1])
    rest = [0, 2, 3]
    for values, others in zip((*routing, grad), (*expected, expected_grad), strict=True):
        assert torch.equal(values[rest], others[rest])
    with pytest.raises(ValueError, match=r"^routed_experts has the expert .* at row 1"):
        forward_backward(logits, 3, routed_experts=experts, check=True)


def test_the_bits_of_a_row_depend_on_nothing_but_the_row():
    logits, experts = random_logits(70_000, 60).to(DEVICE), random_experts(70_000, 60, 4).to(DEVICE)
    together, _ = forward_backward(logits, 4, routed_experts=experts)
    for rows in (slice(0, 1), slice(17, 20), slice(69_999, 70_000)):
        alone, _ = forward_backward(logits[rows].clone(), 4, routed_experts=experts[rows])
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))


def test_in_a_cuda_graph():
    """A captured routing and its backward, replayed with other logits and experts, gives the bits of eager."""
    logits, experts = random_logits(300, 60).to(DEVICE), random_experts(300, 60, 4).to(DEVICE).to(torch.uint8)
    others = (logits.flip(0).contiguous(), experts.flip(0).contiguous())
    held = (logits.clone(), experts.clone())
    graph, (routing, grad) = captured(lambda: forward_backward(held[0], 4, routed_experts=held[1]))
    for values in ((logits, experts), others):
        for place, value in zip(held, values, strict=True):
            place.copy_(value)
        graph.replay()
        expected, expected_grad = forward_backward(values[0], 4, routed_experts=values[1])
        assert all(map(torch.equal, (*routing, grad), (*expected, expected_grad)))
