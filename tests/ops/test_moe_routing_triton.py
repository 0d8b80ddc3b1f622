"""The Triton kernels of moe_routing in Triton's interpreter: values and masks; hardware is not tested."""

import itertools
import math

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from routing_cases import KINDS, check_moe_routing, forward_backward, random_experts
from verify import bounds
from verify.interpreter import recording
from verify.launches import captured

from minirl_kernels import moe_routing
from minirl_kernels.ops.moe_routing.op import moe_routing_backward, moe_routing_forward

pytestmark = triton_cases.interpreter_only()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 2), (60, 4), (67, 13), (300, 8)])
def test_any_number_of_experts(num_experts, top_k, dtype):
    logits, experts = triton_cases.random_logits(4, num_experts, dtype=dtype), random_experts(4, num_experts, top_k)
    for (scoring, norm), replayed in itertools.product(KINDS, (None, experts)):
        check_moe_routing(logits, top_k, routed_experts=replayed, norm_topk_prob=norm, scoring=scoring, scale=1.7)


@pytest.mark.parametrize(("num_groups", "top_k_groups"), [(1, 1), (4, 2), (3, 3), (6, 1)])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_bias_and_groups(scoring, num_groups, top_k_groups):
    logits = triton_cases.random_logits(6, 24)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(2)) / 8
    for correction_bias in (None, bias):
        check_moe_routing(
            logits,
            3,
            scoring=scoring,
            correction_bias=correction_bias,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
        )


@pytest.mark.parametrize(("scoring", "norm"), KINDS)
@pytest.mark.parametrize("ids_dtype", [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64], ids=str)
def test_replaying_the_natural_experts_changes_no_bit(ids_dtype, scoring, norm):
    logits = triton_cases.random_logits(6, 60, dtype=torch.bfloat16)
    options = {"scoring": scoring, "norm_topk_prob": norm}
    natural, grad = forward_backward(logits, 5, **options)
    replayed, replayed_grad = forward_backward(logits, 5, routed_experts=natural.experts.to(ids_dtype), **options)
    assert all(map(torch.equal, (*replayed, replayed_grad), (*natural, grad)))


def test_natural_and_replayed_calls_run_the_same_binary():
    """On a GPU, two specialisations of a kernel may add up in different orders."""
    logits, experts = triton_cases.random_logits(4, 60), random_experts(4, 60, 5)
    valid = torch.ones(5, dtype=torch.bool)[1:]
    with captured() as launches:
        for replay in ((None, None), (experts.to(torch.uint8), None), (experts, valid)):
            moe_routing_forward(logits, 5, *replay, True, "softmax", None, 1, 1, 1.0, "triton")
    constants = [launch.kwargs for launch in launches]
    dtypes = [[value.dtype for value in launch.args if isinstance(value, torch.Tensor)] for launch in launches]
    assert constants[0] == constants[1] == constants[2]
    assert dtypes[0] == dtypes[1] == dtypes[2]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_replayed_experts_whose_scores_underflow(scoring):
    logits = torch.full((1, 128), -200.0)
    logits[:, 0], logits[:, 5], logits[:, 6] = 120.0, -149.0, -150.0
    routing, grad = forward_backward(logits, 2, routed_experts=torch.tensor([[5, 6]]), scoring=scoring)
    torch.testing.assert_close(routing.weights, torch.tensor([[1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]]))
    assert routing.mass.item() == 0
    assert bool((grad[:, 5:7] != 0).all())


@pytest.mark.parametrize("bad", [[3, 20, 1], [3, -1, 5], [3, 2**40, 1], [7, 3, 7]], ids=str)
def test_a_bad_row_is_nan_and_reads_nothing(bad):
    """The row falls back to its natural experts, so that later operations read no memory out of range."""
    logits, experts = triton_cases.random_logits(4, 20), random_experts(4, 20, 3)
    expected = forward_backward(logits, 3, routed_experts=experts)
    experts[1] = torch.tensor(bad)
    with recording() as launches:
        routing, grad = forward_backward(logits, 3, routed_experts=experts)
    assert [fault for launch in launches for fault in bounds.outside(launch)] == []
    for values in (routing.weights, routing.agreement, routing.mass):
        assert values[1].isnan().all()
    assert grad[1].isnan().any()
    assert torch.equal(routing.experts[1], routing.natural_experts[1])
    rest = [0, 2, 3]
    for values, others in zip((*routing, grad), (*expected[0], expected[1]), strict=True):
        assert torch.equal(values[rest], others[rest])


def test_check_raises():
    with pytest.raises(ValueError, match=r"^routed_experts has the expert 20 at row 1"):
        moe_routing(torch.zeros(2, 20), 1, routed_experts=torch.tensor([[3], [20]]), check=True, backend="triton")


def test_rows_that_are_not_valid_route_naturally():
    logits, experts = triton_cases.random_logits(4, 20), random_experts(4, 20, 3)
    valid = torch.tensor([True, False, False, True])
    natural, _ = forward_backward(logits, 3)
    replayed, _ = forward_backward(logits, 3, routed_experts=experts)
    mixed, _ = forward_backward(logits, 3, routed_experts=experts.where(valid[:, None], -1), valid=valid)
    for values, by_replay, by_nature in zip(mixed, replayed, natural, strict=True):
        assert torch.equal(values, by_replay.where(valid.view(-1, *[1] * (values.dim() - 1)), by_nature))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_ties_and_what_is_no_number():
    logits = torch.tensor([[-0.0, 1.0, 1.0, 0.0], [0.0, math.nan, 1.0, 2.0], [-math.inf, 1.0, -math.inf, -math.inf]])
    routing, _ = forward_backward(logits, 3)
    assert routing.experts.tolist() == [[1, 2, 0], [1, 3, 2], [1, 0, 2]]
    assert routing.margin[[0, 2]].tolist() == [0.0, 0.0]
    assert routing.weights[1].isnan().all()
    assert routing.weights[2].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    routing, grad = forward_backward(torch.zeros(tokens, 7), 2, routed_experts=random_experts(tokens, 7, 2))
    assert [tuple(values.shape) for values in routing] == [(tokens, 2)] * 3 + [(tokens,)] * 3
    assert grad.shape == (tokens, 7)


def test_the_bits_of_a_row_do_not_depend_on_its_batch():
    """A program of the kernel reads its own row only."""
    logits, experts = triton_cases.random_logits(5, 60), random_experts(5, 60, 4)
    together = moe_routing(logits, 4, routed_experts=experts, backend="triton")
    for row in range(5):
        one = slice(row, row + 1)
        alone = moe_routing(logits[one], 4, routed_experts=experts[one], backend="triton")
        assert all(torch.equal(values[one], others) for values, others in zip(together, alone, strict=True))


def test_rows_more_than_2_to_the_31_elements_apart():
    stride = 2**31 + 48
    logits = torch.empty(stride + 40, dtype=torch.bfloat16).as_strided((2, 40), (stride, 1))
    logits.copy_(triton_cases.random_logits(2, 40, dtype=torch.bfloat16))
    (far, far_grad), (near, near_grad) = (forward_backward(x, 4) for x in (logits, logits.contiguous()))
    assert all(map(torch.equal, (*far, far_grad), (*near, near_grad)))


def test_more_tokens_than_a_grid_axis_but_the_first_can_count():
    logits = torch.zeros(1, 16).expand(70_000, 16)
    with captured() as launches:
        weights, experts, *_ = moe_routing_forward(logits, 2, *[None] * 2, True, "softmax", None, 1, 1, 1.0, "triton")
        moe_routing_backward(logits, weights, experts, weights, True, "softmax", 1.0, "triton")
    assert [launch.grid for launch in launches] == [(70_000,), (70_000,)]
