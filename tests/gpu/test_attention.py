"""The Triton kernels of attention on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from attention_cases import (
    cancelling_case,
    check_a_query_in_any_batch,
    check_each_choice_of_gradients,
    check_extreme_scores,
    check_nan_stays_in_its_rows,
    check_padded_layouts,
    check_queries_without_keys,
    check_sequences_in_any_batch,
    check_values_and_gradients,
    ours,
    random_case,
)
from dtypes import DTYPES
from policy_batches import assert_same_bits

DEVICE = "cuda"
SHAPES = [
    {"queries": [7, 1, 30], "size": 16},
    {"queries": [700, 5], "heads": 6, "key_heads": 2, "size": 24, "value_size": 40},
    {"queries": [1, 2, 1], "keys": [257, 20, 2000], "heads": 8, "key_heads": 1, "size": 64},
    {"queries": [340, 3], "keys": [570, 90], "heads": 2, "key_heads": 2, "size": 7, "value_size": 1},
    {"queries": [3, 9], "keys": [5, 20], "causal": False, "size": 256},
    {"queries": [300, 200], "heads": 16, "key_heads": 4, "size": 128},
    {"queries": [20], "heads": 71, "key_heads": 1, "size": 64},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    check_values_and_gradients(random_case(**shape, dtype=dtype, device=DEVICE), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_without_keys(dtype):
    check_queries_without_keys(dtype, "triton", DEVICE)


def test_extreme_scores():
    check_extreme_scores("triton", DEVICE)


def test_what_is_no_number_stays_in_its_rows():
    check_nan_stays_in_its_rows("triton", DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_in_any_batch(dtype):
    check_a_query_in_any_batch(cancelling_case([500, 65, 9, 130], dtype=dtype, device=DEVICE), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_in_any_batch(dtype):
    check_sequences_in_any_batch(cancelling_case([500, 17, 130], dtype=dtype, device=DEVICE), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_layouts(dtype):
    check_padded_layouts(cancelling_case([30, 1, 270], [40, 1, 270], dtype=dtype, device=DEVICE), "triton")


def test_gradients_that_nobody_asked_for():
    check_each_choice_of_gradients(random_case([200, 5], dtype=torch.bfloat16, device=DEVICE), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype):
    case = cancelling_case([900, 40, 300], dtype=dtype, device=DEVICE)
    first = ours(case, "triton")
    for _ in range(5):
        assert_same_bits(ours(case, "triton"), first)
