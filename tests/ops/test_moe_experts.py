"""moe_experts against float64 and transformers: results, gradients, and bits that do not depend on the batch."""

import pytest
import torch
from dtypes import DTYPES
from experts_cases import (
    TINY_SIZES,
    assert_exact,
    cancelling_case,
    check_a_token_in_any_batch_and_place,
    check_each_choice_of_gradients,
    check_extreme_gates,
    check_gradient_reaches_the_router,
    check_nan_in_an_expert_reaches_its_own_tokens_alone,
    check_non_finite_values_stay_in_their_token,
    check_nothing_is_kept_without_a_gradient,
    check_one_expert_for_every_rank_of_every_token,
    check_strides,
    check_values_and_gradients,
    equations,
    forward_backward,
    in_float64,
    ours,
    random_case,
)
from linear_head import assert_matrices_as_exact
from policy_batches import assert_same_bits, tables_of_one_order

from minirl_kernels import moe_experts
from minirl_kernels.backends import native
from minirl_kernels.ops.moe_experts.reference import moe_experts_reference

# (T, K, E, H, I): around vectors, panels, blocks (252 rows; 256 and 512 columns) and chunks (256, 512). Also empty
# experts, K = E, and one expert for all.
SIZES = [(23, 4, 4, 33, 31), (300, 1, 1, 20, 301), (40, 3, 9, 530, 17), (9, 2, 60, 64, 48), (270, 2, 2, 17, 40)]
META = torch.device("meta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype, backend):
    check_values_and_gradients(size, dtype, backend)


@pytest.mark.parametrize("size", TINY_SIZES, ids=str)
def test_few_of_anything(size, backend):
    check_values_and_gradients(size, torch.float32, backend)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_every_instruction_set(dtype, isa, set_isa):
    if isa not in native().isa_supported():
        pytest.skip(f"this processor does not run {isa}")
    set_isa(isa)
    operands, upstream = random_case(30, 3, 5, 530, 290, dtype)
    assert_exact(operands, upstream, ours(operands, upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_for_every_rank_of_every_token(dtype, backend):
    check_one_expert_for_every_rank_of_every_token(dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates(dtype, backend):
    check_extreme_gates(dtype, backend)


def test_gradient_reaches_the_router(backend):
    check_gradient_reaches_the_router(backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_transformers_computes_it(dtype, cpu):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    operands, upstream = random_case(40, 2, 6, 48, 32, dtype)
    config = transformers.Qwen3MoeConfig(hidden_size=48, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    module.config = config

    def theirs(hidden, weights, experts, gate_up, down):
        parameters = {"gate_up_proj": gate_up, "down_proj": down}
        return torch.func.functional_call(module, parameters, (hidden, experts, weights.to(hidden.dtype)))

    results = ours(operands, upstream, cpu)
    eager = forward_backward(operands, upstream, theirs)
    exact = forward_backward(in_float64(operands), upstream.double(), theirs)
    for values, their_values, truth in zip(results, eager, exact, strict=True):
        assert_matrices_as_exact(values, their_values, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_in_any_batch_and_place(dtype, cpu):
    check_a_token_in_any_batch_and_place((70, 3, 4, 150, 140), dtype, cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype, cpu, threads):
    """The gradients of the projections keep their bits too."""
    operands, upstream = cancelling_case(300, 3, 4, 150, 140, dtype)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(ours(operands, upstream, cpu))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_equal_on_tables_with_a_fused_multiply_add(dtype, set_isa):
    operands, upstream = cancelling_case(40, 3, 4, 301, 141, dtype)
    results = []
    for isa in tables_of_one_order(dtype):
        set_isa(isa)
        results.append(ours(operands, upstream))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(wrong, backend):
    check_non_finite_values_stay_in_their_token(wrong, backend)


def test_an_expert_that_is_no_number_reaches_its_own_tokens_alone(backend):
    check_nan_in_an_expert_reaches_its_own_tokens_alone(backend)


@pytest.mark.parametrize("count", range(1, 4))
def test_gradients_that_nobody_asked_for(count, cpu):
    check_each_choice_of_gradients(count, cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_kept_without_a_gradient(dtype, cpu):
    check_nothing_is_kept_without_a_gradient(dtype, cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, backend):
    check_strides(dtype, backend, same_bits=backend == "cpu")


def test_dtypes_of_a_routing(backend):
    operands, upstream = random_case(20, 2, 4, 33, 20)
    hidden, weights, experts, gate_up, down = operands
    expected = ours(operands, upstream, backend)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert_same_bits(ours((hidden, weights, experts.to(dtype), gate_up, down), upstream, backend), expected)
    rounded = weights.bfloat16()
    in_bf16 = ours((hidden, rounded, experts, gate_up, down), upstream, backend)
    wide = ours((hidden, rounded.float(), experts, gate_up, down), upstream, backend)
    wide = (*wide[:2], wide[2].bfloat16(), *wide[3:])
    assert_same_bits(in_bf16, wide)


def test_gradient_may_be_taken_twice(backend):
    (hidden, weights, experts, gate_up, down), upstream = random_case(20, 2, 4, 33, 20)
    leaves = [x.requires_grad_() for x in (hidden, weights, gate_up, down)]
    out = moe_experts(hidden, (weights, experts), gate_up, down, backend=backend)
    first, second = (torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)


def test_under_autocast(backend):
    (hidden, weights, experts, gate_up, down), upstream = random_case(20, 2, 4, 33, 20)
    operands = (hidden, weights, experts, gate_up, down)
    rounded = [x.bfloat16() for x in (hidden, gate_up, down)]
    expected = ours((rounded[0], weights, experts, *rounded[1:]), upstream.bfloat16(), backend)

    def under_autocast(hidden, weights, experts, gate_up, down):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return moe_experts(hidden, (weights, experts), gate_up, down, backend=backend)

    results = forward_backward(operands, upstream.bfloat16(), under_autocast)
    assert [values.dtype for values in results] == [torch.bfloat16, *[torch.float32] * 4]
    assert_same_bits(results, [expected[0], *(grad.float() for grad in expected[1:])])


@pytest.mark.parametrize("wrong", [4, -1, 2**40])
def test_an_expert_that_is_none(wrong, backend):
    (hidden, weights, experts, gate_up, down), _ = random_case(20, 2, 4, 33, 20)
    experts[13, 1] = wrong
    with pytest.raises(ValueError, match=rf"^routing\.experts has the expert {wrong} at row 13: .* in \[0, 4\)"):
        moe_experts(hidden, (weights, experts), gate_up, down, backend=backend)


def test_an_expert_that_is_none_by_the_reference_of_a_gpu():
    (hidden, weights, experts, gate_up, down), _ = random_case(20, 2, 4, 33, 20)
    expected = moe_experts_reference(hidden, weights, experts, gate_up, down)
    experts[13, 1], experts[2, 0] = 4, -1
    out = moe_experts_reference(hidden, weights, experts, gate_up, down)
    assert out[[2, 13]].isnan().all()
    rest = [token for token in range(20) if token not in (2, 13)]
    torch.testing.assert_close(out[rest], expected[rest])  # torch's matmul has other bits for fewer rows


def test_no_experts_at_all_are_refused_not_read(backend):
    (hidden, weights, experts, gate_up, down), _ = random_case(20, 2, 4, 33, 20)
    with pytest.raises(ValueError, match=r"^gate_up_proj has shape \(0, 40, 33\)"):
        moe_experts(hidden, (weights, experts), gate_up[:0], down[:0], backend=backend)


HIDDEN, WEIGHTS, EXPERTS = torch.zeros(3, 8), torch.ones(3, 2), torch.tensor([[0, 1], [2, 3], [3, 0]])
GATE_UP, DOWN = torch.zeros(4, 10, 8), torch.zeros(4, 8, 5)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"hidden": HIDDEN.double()}, TypeError, "hidden", "torch.float64", "float32, bfloat16"),
        ({"hidden": HIDDEN[None]}, ValueError, "hidden", r"\(1, 3, 8\)", r"\[T, H\]"),
        ({"hidden": torch.zeros(8, 3).T}, ValueError, "hidden", r"\(1, 3\)", "contiguous"),
        ({"hidden": HIDDEN.tolist()}, TypeError, "hidden", "list", "a tensor"),
        ({"gate_up_proj": GATE_UP.bfloat16()}, TypeError, "gate_up_proj", "bfloat16", "dtype of hidden, .*float32"),
        ({"gate_up_proj": GATE_UP[0]}, ValueError, "gate_up_proj", r"\(10, 8\)", "three dimensions"),
        ({"gate_up_proj": GATE_UP[:, :9]}, ValueError, "gate_up_proj", r"\(4, 9, 8\)", r"\[E, 2 I, 8\]"),
        ({"gate_up_proj": GATE_UP[:, :, :7]}, ValueError, "gate_up_proj", r"\(4, 10, 7\)", r"\[E, 2 I, 8\]"),
        ({"gate_up_proj": torch.zeros(4, 8, 10).mT}, ValueError, "gate_up_proj", r"\(80, 1, 10\)", "contiguous"),
        ({"gate_up_proj": GATE_UP.to(META)}, ValueError, "gate_up_proj", "meta", "cpu"),
        ({"down_proj": DOWN.half()}, TypeError, "down_proj", "float16", "dtype of hidden, .*float32"),
        ({"down_proj": DOWN[:3]}, ValueError, "down_proj", r"\(3, 8, 5\)", r"\(4, 8, 5\)"),
        ({"down_proj": DOWN[:, :7]}, ValueError, "down_proj", r"\(4, 7, 5\)", r"\(4, 8, 5\)"),
        ({"down_proj": torch.zeros(4, 5, 8).mT}, ValueError, "down_proj", r"\(40, 1, 8\)", "contiguous"),
        ({"routing": WEIGHTS}, TypeError, "routing", "Tensor", "a Routing, or a pair"),
        ({"routing": (EXPERTS, WEIGHTS)}, TypeError, r"routing\.weights", "int64", "floating point"),
        ({"routing": (WEIGHTS, WEIGHTS)}, TypeError, r"routing\.experts", "float32", "integers"),
        ({"routing": (WEIGHTS[:2], EXPERTS)}, ValueError, r"routing\.weights", r"\(2, 2\)", r"\[3, K\]"),
        ({"routing": (WEIGHTS[:, :0], EXPERTS[:, :0])}, ValueError, r"routing\.weights", r"\(3, 0\)", r"\[3, K\]"),
        ({"routing": (WEIGHTS, EXPERTS[:, :1])}, ValueError, r"routing\.experts", r"\(3, 1\)", r"\(3, 2\)"),
        ({"activation": "gelu"}, ValueError, "activation", "'gelu'", "'silu'"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    good = {
        "hidden": HIDDEN,
        "routing": (WEIGHTS, EXPERTS),
        "gate_up_proj": GATE_UP,
        "down_proj": DOWN,
        "backend": backend,
    }
    moe_experts(**good)
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        moe_experts(**{**good, **bad})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expert_without_tokens_has_no_gradient_where_memory_was_used(dtype, cpu):
    """The gradient is 0 in reused memory too.

    The tensors are so large that their pages are returned to the system instead of written.
    """
    (hidden, weights, experts, gate_up, down), upstream = random_case(5, 1, 3, 1100, 501, dtype)
    operands = (hidden, weights, torch.ones_like(experts), gate_up, down)
    used = [torch.full_like(weight, torch.nan) for weight in (gate_up, down)]
    del used
    results = ours(operands, upstream, cpu)
    assert_exact(operands, upstream, results)
    for grad in results[-2:]:
        assert not grad[[0, 2]].any()


def test_the_gradient_by_routing_weights_that_cancels(cpu):
    """The gradient is a dot product of two long sums, 20 to 75 times smaller than its terms.

    The sums must be accurate enough for it.
    """
    (hidden, weights, experts, gate_up, down), upstream = random_case(5, 1, 3, 1100, 501)
    operands = (hidden, weights, torch.ones_like(experts), gate_up, down)
    *_, grad, _, _ = ours(operands, upstream, cpu)
    *_, exact, _, _ = forward_backward(in_float64(operands), upstream.double(), equations)
    assert (grad - exact).norm() < 7e-7 * exact.norm()
