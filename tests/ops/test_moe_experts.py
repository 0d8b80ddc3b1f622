"""moe_experts against float64 and transformers: results, gradients, and bits that nothing else in the batch moves."""

import itertools

import pytest
import torch
from linear_head import assert_matrices_as_exact
from torch.nn import functional as F

from minirl_kernels import moe_experts, moe_routing
from minirl_kernels.backends import native
from minirl_kernels.ops.moe_routing.reference import moe_routing_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (T, K, E, H, I): around vectors, panels, blocks (252 rows; 256 and 512 columns) and chunks (256, 512); empty experts,
# K = E, and one expert for all
SIZES = [(23, 4, 4, 33, 31), (300, 1, 1, 20, 301), (40, 3, 9, 530, 17), (9, 2, 60, 64, 48), (270, 2, 2, 17, 40)]
TINY_SIZES = [(0, 2, 3, 8, 4), (1, 1, 1, 1, 1), (1, 3, 5, 16, 16), (2, 1, 2, 1, 3), (3, 2, 2, 3, 1)]
NAMES = ("hidden", "weights", "gate_up_proj", "down_proj")
META = torch.device("meta")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_case(tokens, top_k, num_experts, hidden_size, width, dtype=torch.float32):
    """(hidden, weights, experts, gate_up_proj, down_proj), and the gradient of the result."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.softmax(normal(tokens, top_k, seed=2), -1)
    gate_up = (2 * normal(num_experts, 2 * width, hidden_size, seed=3) / hidden_size**0.5).to(dtype)
    down = (normal(num_experts, hidden_size, width, seed=4) / width**0.5).to(dtype)
    hidden, upstream = (normal(tokens, hidden_size, seed=seed).to(dtype) for seed in (5, 6))
    return (hidden, weights, experts, gate_up, down), upstream


def cancelling_case(tokens, top_k, num_experts, half, half_width, dtype):
    """Every sum is 0 but for rounding, so that any other order of it shows: that of up, of the result, of the gradients
    by the activation, by hidden and by the weights."""
    (hidden, weights, experts, gate_up, down), upstream = random_case(
        tokens, top_k, num_experts, half, half_width, torch.float64
    )
    gate, up = gate_up.chunk(2, 1)
    # what is left of a sum must not underflow in float16
    gate, up = torch.cat([gate, gate], 2) / 128, torch.cat([up, -up], 2) * 64
    down = torch.cat([down, -down], 2) * 2**15
    hidden, upstream = (64 * torch.cat([x, x], 1).to(dtype) for x in (hidden, upstream))
    gate_up, down = torch.cat([gate, gate, up, up], 1).to(dtype), torch.cat([down, -down], 1).to(dtype)
    return (hidden, weights, experts, gate_up, down), upstream


def forward_backward(operands, upstream, function, wanted=NAMES):
    """(result, its gradients by those of NAMES that are wanted)."""
    hidden, weights, experts, gate_up, down = operands
    leaves = dict(zip(NAMES, (hidden, weights, gate_up, down), strict=True))
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in leaves.items()}
    out = function(leaves["hidden"], leaves["weights"], experts, leaves["gate_up_proj"], leaves["down_proj"])
    return out.detach(), *torch.autograd.grad(out, [leaves[name] for name in wanted], upstream)


def ours(operands, upstream, backend="cpu", wanted=NAMES):
    def function(hidden, weights, experts, gate_up, down):
        return moe_experts(hidden, (weights, experts), gate_up, down, backend=backend)

    return forward_backward(operands, upstream, function, wanted)


def equations(hidden, weights, experts, gate_up, down):
    """In the dtype of hidden, as an eager model has them."""
    out = torch.zeros_like(hidden)
    for expert in range(len(gate_up)):
        tokens, ranks = torch.where(experts == expert)
        gate, up = F.linear(hidden[tokens], gate_up[expert]).chunk(2, -1)
        given = F.linear(F.silu(gate) * up, down[expert]) * weights[tokens, ranks, None]
        out = out.index_add(0, tokens, given.to(out.dtype))
    return out


def in_float64(operands):
    return [x.double() if x.is_floating_point() else x for x in operands]


def assert_exact(operands, upstream, results):
    exact = forward_backward(in_float64(operands), upstream.double(), equations)
    eager = forward_backward(operands, upstream, equations)
    for actual, theirs, truth in zip(results, eager, exact, strict=True):
        assert_matrices_as_exact(actual, theirs, truth)


def assert_same_bits(actual, expected):
    for values, right in zip(actual, expected, strict=True):
        assert values.dtype == right.dtype
        assert torch.equal(values, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype, backend):
    operands, upstream = random_case(*size, dtype)
    results = ours(operands, upstream, backend)
    assert_exact(operands, upstream, results)


@pytest.mark.parametrize("size", TINY_SIZES, ids=str)
def test_few_of_anything(size, backend):
    operands, upstream = random_case(*size)
    assert_exact(operands, upstream, ours(operands, upstream, backend))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_every_instruction_set(dtype, isa, set_isa):
    if isa not in native().isa_supported():
        pytest.skip(f"this processor does not run {isa}")
    set_isa(isa)
    operands, upstream = random_case(30, 3, 5, 530, 290, dtype)
    assert_exact(operands, upstream, ours(operands, upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_expert_for_every_rank_of_every_token(dtype, backend):
    (hidden, weights, experts, gate_up, down), upstream = random_case(150, 2, 4, 40, 24, dtype)
    operands = (hidden, weights, torch.full_like(experts, 2), gate_up, down)
    results = ours(operands, upstream, backend)
    assert_exact(operands, upstream, results)
    for grad in results[-2:]:
        assert not grad[[0, 1, 3]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_gates(dtype, backend):
    """silu goes to 0 and to x; a sigmoid that underflows is 0 rather than a little, times a large gate."""
    gates = torch.tensor([-6e4, -3e3, -200.0, -90, -87, -30, -17, 0, 17, 30, 88, 200, 3e3, 6e4])
    eye = torch.eye(len(gates))
    operands = (
        gates.diag().to(dtype),
        torch.ones(len(gates), 1),
        torch.zeros(len(gates), 1, dtype=torch.int64),
        # the gate of each is its own number, up is 1 / 64 of it
        torch.cat([eye, eye / 64])[None].to(dtype),
        eye[None].to(dtype),
    )
    upstream = torch.ones_like(eye).to(dtype)
    results = ours(operands, upstream, backend)
    assert_exact(operands, upstream, results)
    assert not results[0][:3].any()
    assert not any(grad.isnan().any() for grad in results)


def test_gradient_reaches_the_router(backend):
    """From the experts' result to the logits that chose them, natural and replayed."""
    operands, upstream = random_case(30, 3, 8, 24, 20)
    hidden, _, replayed, gate_up, down = operands
    logits = 2 * normal(30, 8, seed=9)
    for routed in (None, replayed):
        leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
        routing = moe_routing(leaf, 3, routed_experts=routed, backend=backend)
        out = moe_experts(hidden, routing, gate_up, down, backend=backend)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
        weights, experts, *_ = moe_routing_reference(exact_leaf, 3, routed)
        exact = equations(*in_float64((hidden, weights, experts, gate_up, down)))
        (exact_grad,) = torch.autograd.grad(exact, exact_leaf, upstream.double())
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5 * exact_grad.abs().max().item())
        assert bool((exact_grad != 0).any())


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
    """The result, and the gradients by hidden and the weights."""
    operands, upstream = cancelling_case(70, 3, 4, 150, 140, dtype)

    def of(tokens):
        hidden, weights, experts, gate_up, down = operands
        part = (hidden[tokens], weights[tokens], experts[tokens], gate_up, down)
        return ours(part, upstream[tokens], cpu)[:3]

    whole = of(torch.arange(70))
    for values in whole:
        assert values.count_nonzero() > values.numel() // 2
    parts = [torch.tensor([token]) for token in (0, 1, 37, 69)]
    parts += [torch.arange(3, 6), torch.arange(5, 68), torch.randperm(70, generator=torch.Generator().manual_seed(0))]
    for tokens in parts:
        assert_same_bits(of(tokens), [values[tokens] for values in whole])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype, cpu, threads):
    """The gradients of the projections too."""
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
    for isa in sorted(set(native().isa_supported()) - {"baseline"}):
        set_isa(isa)
        results.append(ours(operands, upstream))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_token(wrong, backend):
    operands, upstream = random_case(40, 2, 3, 33, 20)
    expected = ours(operands, upstream, backend)[:3]
    operands[0][17, 5] = wrong
    results = ours(operands, upstream, backend)[:3]
    rest = torch.arange(40) != 17
    assert_same_bits([values[rest] for values in results], [values[rest] for values in expected])
    assert not results[0][17].isfinite().any()


def test_an_expert_that_is_no_number_reaches_its_own_tokens_alone(backend):
    operands, upstream = random_case(40, 2, 5, 33, 20)
    expected = ours(operands, upstream, backend)
    _, _, experts, gate_up, down = operands
    gate_up[2], down[2] = float("nan"), float("nan")
    results = ours(operands, upstream, backend)
    rest = (experts != 2).all(-1)
    assert rest.any()
    assert not rest.all()
    assert_same_bits([values[rest] for values in results[:3]], [values[rest] for values in expected[:3]])
    others = [0, 1, 3, 4]  # their gradients come from tokens that expert 2 has made NaN in the result alone
    assert_same_bits([grad[others] for grad in results[3:]], [grad[others] for grad in expected[3:]])


@pytest.mark.parametrize("count", range(1, 4))
def test_gradients_that_nobody_asked_for(count, cpu):
    operands, upstream = random_case(20, 2, 4, 33, 20, torch.bfloat16)
    everything = dict(zip(("out", *NAMES), ours(operands, upstream, cpu), strict=True))
    for wanted in itertools.combinations(NAMES, count):
        results = ours(operands, upstream, cpu, wanted)
        assert_same_bits(results, [everything[name] for name in ("out", *wanted)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_kept_without_a_gradient(dtype, cpu):
    operands, upstream = random_case(20, 2, 4, 33, 20, dtype)
    hidden, weights, experts, gate_up, down = operands
    expected = ours(operands, upstream, cpu)[0]
    ids = experts.contiguous()
    out, kept = torch.ops.minirl_kernels.moe_experts(hidden, weights, ids, gate_up, down, False, cpu)
    assert torch.equal(out, expected)
    assert kept.numel() == 0
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        out = moe_experts(leaf, (weights, experts), gate_up, down, backend=cpu)
    assert torch.equal(out, expected)
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype, backend):
    """A slice of a wider buffer is no copy, in any operand; an expanded gradient is as good as another."""
    (hidden, weights, experts, gate_up, down), _ = random_case(20, 2, 4, 33, 20, dtype)
    expanded = torch.ones((), dtype=dtype).expand(20, 33)
    plain = ours((hidden, weights, experts, gate_up, down), expanded.contiguous(), backend)
    wide = torch.full((20, 50), torch.nan, dtype=dtype)
    wide_gate_up = torch.full((5, 43, 40), torch.nan, dtype=dtype)
    wide_down = torch.full((33, 4, 29), torch.nan, dtype=dtype)
    wide[:, 7:40], wide_gate_up[1:, 3:, 2:35], wide_down[:, :, 9:] = hidden, gate_up, down.transpose(0, 1)
    sliced = (wide[:, 7:40], weights.T.contiguous().T, experts.T.contiguous().T, wide_gate_up[1:, 3:, 2:35])
    results = ours((*sliced, wide_down[:, :, 9:].transpose(0, 1)), expanded, backend)
    if backend == "cpu":
        assert_same_bits(results, plain)
    for values, right in zip(results, plain, strict=True):
        torch.testing.assert_close(values, right)


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
        ({"gate_up_proj": GATE_UP.bfloat16()}, TypeError, "gate_up_proj", "bfloat16", "that of hidden, .*float32"),
        ({"gate_up_proj": GATE_UP[0]}, ValueError, "gate_up_proj", r"\(10, 8\)", "three dimensions"),
        ({"gate_up_proj": GATE_UP[:, :9]}, ValueError, "gate_up_proj", r"\(4, 9, 8\)", r"\[E, 2 I, 8\]"),
        ({"gate_up_proj": GATE_UP[:, :, :7]}, ValueError, "gate_up_proj", r"\(4, 10, 7\)", r"\[E, 2 I, 8\]"),
        ({"gate_up_proj": torch.zeros(4, 8, 10).mT}, ValueError, "gate_up_proj", r"\(80, 1, 10\)", "contiguous"),
        ({"gate_up_proj": GATE_UP.to(META)}, ValueError, "gate_up_proj", "meta", "cpu"),
        ({"down_proj": DOWN.half()}, TypeError, "down_proj", "float16", "that of hidden, .*float32"),
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
