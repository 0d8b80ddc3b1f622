"""The sort of moe_experts in Triton's interpreter, against a sort by Python."""

import pytest
import torch
import triton_cases

pytest.importorskip("triton", reason="triton is not installed")

from minirl_kernels.ops.moe_experts.kernels_sort import sort_config, sorted_rows

pytestmark = triton_cases.interpreter_only()

TILE = sort_config().tile


def assert_sorted(experts, num_experts):
    rows = sorted_rows(experts, num_experts)
    keys = [expert if 0 <= expert < num_experts else num_experts for expert in experts.flatten().tolist()]
    assert rows.pairs.tolist() == sorted(range(len(keys)), key=keys.__getitem__)
    counts = torch.bincount(torch.tensor(keys, dtype=torch.int64), minlength=num_experts + 1)
    assert rows.begins.tolist() == [0, *counts.cumsum(0).tolist()]
    assert (rows.num_experts, rows.top_k) == (num_experts, experts.shape[1])


def random_ids(tokens, top_k, low, high, dtype=torch.int64):
    return torch.randint(low, high, (tokens, top_k), generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("tokens", [0, 1, 64, TILE // 2 - 1, TILE // 2, TILE // 2 + 1, 5 * TILE])
@pytest.mark.parametrize("num_experts", [1, 2, 6])
def test_any_number_of_pairs(tokens, num_experts):
    """Around a tile, and in several segments; some ids are out of range on both sides."""
    assert_sorted(random_ids(tokens, 2, -1, num_experts + 1), num_experts)


@pytest.mark.parametrize("num_experts", [3, 4, 5, 126, 127, 128, 1000])
def test_any_number_of_experts(num_experts):
    assert_sorted(random_ids(30, 3, 0, num_experts), num_experts)


@pytest.mark.parametrize("expert", [-1, 0, 5, 6])
def test_all_pairs_to_one_expert(expert):
    assert_sorted(torch.full((TILE, 3), expert), 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32], ids=str)
def test_ids_of_other_dtypes(dtype):
    """With more experts than the narrowest dtype can count, no padding becomes an expert."""
    assert_sorted(random_ids(70, 2, 0, 250, dtype), 200 if dtype == torch.uint8 else 240)
    assert_sorted(random_ids(70, 2, 0, 250, dtype), 300)


def test_ids_that_32_bits_cannot_hold():
    assert_sorted(torch.tensor([[3, 2**32], [2**40 + 1, 0], [-(2**33), 1]]), 4)
