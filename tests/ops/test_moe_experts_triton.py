"""The Triton kernels of moe_experts in Triton's interpreter: values and masks; hardware is not tested."""

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from experts_cases import (
    TINY_SIZES,
    check_a_token_in_any_batch_and_place,
    check_an_expert_out_of_range,
    check_each_choice_of_gradients,
    check_extreme_gates,
    check_gradient_reaches_the_router,
    check_nan_in_an_expert_reaches_its_own_tokens_alone,
    check_non_finite_values_stay_in_their_token,
    check_nothing_is_kept_without_a_gradient,
    check_one_expert_for_every_rank_of_every_token,
    check_strides,
    check_values_and_gradients,
    ours,
    random_case,
)
from verify import bounds
from verify.interpreter import recording
from verify.launches import captured, on_gpu

from minirl_kernels.ops.moe_experts import kernels
from minirl_kernels.ops.moe_experts.kernels_tiles import tiles

pytestmark = triton_cases.interpreter_only()

# (T, K, E, H, I): around blocks of rows (64), columns (32 to 128) and summed elements (16 to 64). Also empty experts, K
# = E, and one expert for all.
SIZES = [(23, 4, 4, 33, 31), (65, 1, 1, 20, 129), (64, 1, 2, 128, 64), (40, 3, 9, 130, 17), (9, 2, 60, 64, 48)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype):
    check_values_and_gradients(size, dtype, "triton")


@pytest.mark.parametrize("size", TINY_SIZES, ids=str)
def test_few_of_anything(size):
    check_values_and_gradients(size, torch.float32, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_for_every_rank_of_every_token(dtype):
    check_one_expert_for_every_rank_of_every_token(dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates(dtype):
    check_extreme_gates(dtype, "triton")


def test_gradient_reaches_the_router():
    check_gradient_reaches_the_router("triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_in_any_batch_and_place(dtype):
    check_a_token_in_any_batch_and_place((70, 2, 2, 72, 68), dtype, "triton")


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(wrong):
    check_non_finite_values_stay_in_their_token(wrong, "triton")


def test_an_expert_that_is_no_number_reaches_its_own_tokens_alone():
    check_nan_in_an_expert_reaches_its_own_tokens_alone("triton")


@pytest.mark.parametrize("count", range(1, 4))
def test_gradients_that_nobody_asked_for(count):
    check_each_choice_of_gradients(count, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_kept_without_a_gradient(dtype):
    check_nothing_is_kept_without_a_gradient(dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    check_strides(dtype, "triton", same_bits=True)


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
def test_an_expert_that_is_none(wrong):
    with recording() as launches:
        check_an_expert_out_of_range(wrong, "triton")
    assert [fault for launch in launches for fault in bounds.outside(launch)] == []


def test_no_token_has_an_expert():
    (hidden, weights, experts, gate_up, down), upstream = random_case(3, 2, 4, 33, 20)
    results = ours((hidden, weights, torch.full_like(experts, -1), gate_up, down), upstream, "triton")
    assert all(values.isnan().all() for values in results[:3])
    assert not any(grad.any() for grad in results[3:])


@pytest.mark.parametrize("counts", [[0, 0, 5], [64, 0, 1], [63, 65, 1], [1] * 200, [300, 0, 0, 0], [0, 127, 2, 63, 64]])
def test_blocks_hold_every_row_once(counts):
    """A block has rows of its own expert only, and there are enough blocks."""
    begins = torch.tensor([0, *counts, 0]).cumsum(0)
    rows = kernels.Rows(torch.arange(sum(counts)), begins, 1)
    x, matrix = torch.ones(sum(counts), 1), torch.arange(1.0, len(counts) + 1)[:, None, None]
    y = torch.full((sum(counts), 1), -1.0)
    kernels.product(x, matrix, rows, y, transposed=False)
    assert y[:, 0].tolist() == [expert + 1.0 for expert, count in enumerate(counts) for _ in range(count)]
    config = tiles(x, (1, 1), rows.mean).product
    assert rows.blocks(config) >= sum(-(-count // config.rows) for count in counts)


def test_rows_and_matrices_more_than_2_to_the_31_elements_apart():
    (hidden, weights, experts, gate_up, down), upstream = random_case(2, 1, 2, 24, 16, torch.bfloat16)
    near = ours((hidden, weights, experts, gate_up, down), upstream, "triton")
    stride = 2**31 + 48

    def far(x):
        out = torch.empty(stride + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]))
        return out.copy_(x)

    for index in (0, 3, 4):
        operands = [hidden, weights, experts, gate_up, down]
        operands[index] = far(operands[index])
        results = ours(operands, upstream, "triton")
        assert all(map(torch.equal, results, near))


def test_more_tokens_than_a_grid_axis_but_the_first_can_count():
    tokens = 70_000
    hidden, weights = torch.zeros(1, 16).expand(tokens, 16), torch.ones(tokens, 2)
    experts, gate_up, down = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(3, 32, 16), torch.zeros(3, 16, 16)
    with captured() as launches:
        ours((hidden, weights, experts, gate_up, down), torch.zeros(tokens, 16), "triton")
    blocks = 2 * tokens // 64 + 4
    assert {launch.grid[0] for launch in launches} == {2, tokens, blocks, 3}
    assert all(size < 65_536 for launch in launches for size in launch.grid[1:])


def launches_of(operands, upstream, gpu):
    """{kernel: constants of its launches}"""
    with on_gpu(gpu), captured() as launches:
        ours(operands, upstream, "triton")
    constants: dict[str, list] = {}
    for launch in launches:
        constants.setdefault(launch.kernel.__name__, []).append(launch.kwargs)
    return constants


def few_and_many(gpu):
    return [launches_of(*random_case(tokens, 2, 4, 32, 16, torch.bfloat16), gpu) for tokens in (1, 1000)]


@pytest.mark.parametrize("gpu", ["sm_80", "sm_100", "gfx942"])
def test_a_large_batch_and_a_small_one_run_the_same_binaries(gpu):
    """Tensor cores could add up in another order in another tile. These GPUs were not measured."""
    few, many = few_and_many(gpu)
    assert few == many


def test_a_sum_over_columns_has_one_tile_for_any_batch():
    """On a GPU that was measured, products alone may have another tile for more rows."""
    few, many = few_and_many("sm_90")
    assert {name for name in few if few[name] != many[name]} == {"experts_up_kernel", "experts_product_kernel"}


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_operands_at_any_address_run_the_same_binaries(gpu):
    (hidden, weights, experts, *projections), upstream = random_case(70, 2, 2, 48, 32, torch.bfloat16)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in (hidden, *projections)]
    aligned = launches_of((hidden, weights, experts, *projections), upstream, gpu)
    assert launches_of((shifted[0], weights, experts, *shifted[1:]), upstream, gpu) == aligned
