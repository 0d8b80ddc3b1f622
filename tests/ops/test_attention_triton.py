"""The Triton kernels of attention in Triton's interpreter: values and masks; hardware is not tested."""

import numpy as np
import pytest
import torch
import triton_cases
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
    equations,
    forward_backward,
    ours,
    random_case,
)
from dtypes import DTYPES
from triton.runtime import interpreter
from verify.launches import captured

pytestmark = triton_cases.interpreter_only()

# sizes around blocks of rows (16 to 64) and keys (16 to 64), no powers of two, and groups that divide no block
SHAPES = [
    {"queries": [7, 1, 30], "size": 16},
    {"queries": [70, 5], "heads": 6, "key_heads": 2, "size": 24, "value_size": 40},
    {"queries": [1, 2, 1], "keys": [67, 20, 130], "heads": 8, "key_heads": 1, "size": 64},
    {"queries": [40, 3], "keys": [70, 90], "heads": 2, "key_heads": 2, "size": 7, "value_size": 1},
    {"queries": [3, 9], "keys": [5, 20], "causal": False, "size": 256},
    {"queries": [12], "heads": 71, "key_heads": 1, "size": 8},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype):
    check_values_and_gradients(random_case(**shape, dtype=dtype), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_without_keys(dtype):
    check_queries_without_keys(dtype, "triton")


def test_no_tokens():
    assert [values.shape for values in ours(random_case([], size=8), "triton")] == [
        (0, 4, 8),
        (0, 4, 8),
        *[(0, 2, 8)] * 2,
    ]


def test_extreme_scores():
    check_extreme_scores("triton")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_stays_in_its_rows():
    check_nan_stays_in_its_rows("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_in_any_batch(dtype):
    check_a_query_in_any_batch(cancelling_case([70, 9], dtype=dtype, heads=2, key_heads=1), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_in_any_batch(dtype):
    check_sequences_in_any_batch(cancelling_case([70, 17, 30], dtype=dtype, heads=2, key_heads=1), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_layouts(dtype):
    check_padded_layouts(cancelling_case([20, 1, 65], [30, 1, 65], dtype=dtype, heads=2, key_heads=1), "triton")


def test_gradients_that_nobody_asked_for():
    check_each_choice_of_gradients(random_case([20, 5], dtype=torch.bfloat16), "triton")


def chain_of_products(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A float32 product as a GPU computes it: a chain of fused multiply-adds that begins with d."""
    total = d.data.astype(np.float32)
    for left, right in zip(np.moveaxis(a.data, -1, 0), b.data, strict=True):
        total = (left[:, None].astype(np.float64) * right + total).astype(np.float32)
    return interpreter.TensorHandle(total, d.dtype.scalar)


@pytest.mark.parametrize(("queries", "keys"), [(4, 8192), (8192, 4)])
def test_long_sums_in_float32(queries, keys, monkeypatch):
    """The error of a sum over 8192 keys, or over 8192 queries, is at most 1.5 times that of eager torch."""
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", chain_of_products)
    case = random_case([queries], [keys], heads=1, key_heads=1, size=32, causal=False)
    # the result and d q are sums over keys, d k and d v are sums over queries
    wanted, first = (("q",), 0) if keys > queries else (("k", "v"), 1)
    results = ours(case, "triton", wanted)[first:]
    eager, exact = (forward_backward(x, equations, wanted)[first:] for x in (case, case.in_float64()))
    for actual, theirs, truth in zip(results, eager, exact, strict=True):
        assert (actual - truth).norm() <= 1.5 * (theirs - truth).norm()


def test_rows_more_than_2_to_the_31_elements_apart():
    case = random_case([2], heads=2, key_heads=1, size=8, dtype=torch.bfloat16)
    near, stride = ours(case, "triton"), 2**31 + 64
    for name in ("q", "k", "v"):
        moved = random_case([2], heads=2, key_heads=1, size=8, dtype=torch.bfloat16)
        x = getattr(moved, name)
        far = torch.empty(stride + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]))
        setattr(moved, name, far.copy_(x))
        assert torch.equal(ours(moved, "triton", ("q",) if name != "q" else ("k",))[0], near[0])


def test_more_tokens_than_a_grid_axis_but_the_first_can_count():
    tokens = 70_000
    case = random_case([1], heads=2, key_heads=1, size=8)
    case.q, case.k, case.v = (x.expand(tokens, -1, -1) for x in (case.q, case.k, case.v))
    case.upstream, case.queries, case.keys = case.upstream.expand(tokens, -1, -1), [1] * tokens, [1] * tokens
    with captured() as launches:
        ours(case, "triton")
    assert len(launches) == 3
    assert all(launch.grid[0] >= tokens and launch.grid[1] == 1 for launch in launches)


def test_a_large_batch_and_a_small_one_run_the_same_binaries():
    """A GPU could use another tile for another batch, and add up in another order."""

    def constants_of(queries):
        with captured() as launches:
            ours(random_case(queries, [40] * len(queries), dtype=torch.bfloat16), "triton")
        return [launch.kwargs for launch in launches]

    assert constants_of([1]) == constants_of([40] * 100)
