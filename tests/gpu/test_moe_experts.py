"""The Triton kernels of moe_experts on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from cuda_graphs import captured
from dtypes import DTYPES
from experts_cases import (
    TINY_SIZES,
    cancelling_case,
    check_a_token_in_any_batch_and_place,
    check_an_expert_out_of_range,
    check_extreme_gates,
    check_gradient_reaches_the_router,
    check_nan_in_an_expert_reaches_its_own_tokens_alone,
    check_non_finite_values_stay_in_their_token,
    check_one_expert_for_every_rank_of_every_token,
    check_strides,
    check_values_and_gradients,
    ours,
    random_case,
)
from policy_batches import assert_same_bits

DEVICE = "cuda"
SIZES = [(23, 4, 4, 33, 31), (300, 1, 1, 20, 301), (40, 3, 9, 530, 17), (500, 8, 60, 256, 136), (1000, 4, 16, 512, 192)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype):
    check_values_and_gradients(size, dtype, "triton", DEVICE)


@pytest.mark.parametrize("size", TINY_SIZES, ids=str)
def test_few_of_anything(size):
    check_values_and_gradients(size, torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_for_every_rank_of_every_token(dtype):
    check_one_expert_for_every_rank_of_every_token(dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates(dtype):
    check_extreme_gates(dtype, "triton", DEVICE)


def test_gradient_reaches_the_router():
    check_gradient_reaches_the_router("triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half_sizes", [(150, 140), (152, 144)], ids=str)
def test_a_token_in_any_batch_and_place(half_sizes, dtype):
    """The sizes 304 and 288 are whole numbers of 128-bit accesses, so that more rows may have larger tiles."""
    check_a_token_in_any_batch_and_place((600, 3, 4, *half_sizes), dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    """The gradients of the projections keep their bits too."""
    operands, upstream = cancelling_case(2000, 3, 4, 150, 140, dtype, DEVICE)
    assert_same_bits(*(ours(operands, upstream, "triton") for _ in range(2)))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(wrong):
    check_non_finite_values_stay_in_their_token(wrong, "triton", DEVICE)


def test_an_expert_that_is_no_number_reaches_its_own_tokens_alone():
    check_nan_in_an_expert_reaches_its_own_tokens_alone("triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    check_strides(dtype, "triton", DEVICE, same_bits=True)


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
def test_an_expert_that_is_none(wrong):
    check_an_expert_out_of_range(wrong, "triton", DEVICE)


@pytest.mark.parametrize(("tokens", "top_k", "num_experts"), [(0, 2, 3), (64, 8, 128), (8192, 8, 128), (70_000, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_the_sort_against_torch(tokens, top_k, num_experts, dtype):
    from minirl_kernels.ops.moe_experts.kernels_sort import sorted_rows

    ids = torch.randint(-1, num_experts + 1, (tokens, top_k), device=DEVICE)
    rows = sorted_rows(ids.to(dtype), num_experts)
    keys, pairs = (
        ids.flatten().where((ids.flatten() >= 0) & (ids.flatten() < num_experts), num_experts).sort(stable=True)
    )
    begins = torch.searchsorted(keys, torch.arange(num_experts + 2, device=DEVICE))
    assert_same_bits(rows[:2], (pairs, begins))


def test_in_a_cuda_graph():
    """A captured forward and backward, replayed with other tokens, experts and weights, gives the bits of eager."""
    first, _ = random_case(50, 2, 4, 64, 48, torch.bfloat16, DEVICE)
    (hidden, weights, experts, gate_up, down), upstream = random_case(50, 2, 4, 64, 48, torch.bfloat16, DEVICE)
    other = (hidden.flip(0).contiguous(), weights.flip(0).contiguous(), experts.flip(0).contiguous(), gate_up, down)
    held = tuple(values.clone() for values in first)
    graph, results = captured(lambda: ours(held, upstream, "triton"))
    for values in (first, other):
        for place, value in zip(held, values, strict=True):
            place.copy_(value)
        graph.replay()
        assert_same_bits(results, ours(values, upstream, "triton"))


def test_nothing_waits_for_the_gpu():
    operands, upstream = random_case(50, 2, 4, 64, 48, torch.bfloat16, DEVICE)
    ours(operands, upstream, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(operands, upstream, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
