"""Cases for the tests of moe_experts, and checks of them, for the CPU, Triton's interpreter and a GPU."""

from __future__ import annotations

import itertools

import torch
from linear_head import assert_matrices_as_exact
from policy_batches import assert_same_bits
from torch.nn import functional as F

from minirl_kernels import moe_experts, moe_routing
from minirl_kernels.ops.moe_routing.reference import moe_routing_reference

# (T, K, E, H, I)
TINY_SIZES = [(0, 2, 3, 8, 4), (1, 1, 1, 1, 1), (1, 3, 5, 16, 16), (2, 1, 2, 1, 3), (3, 2, 2, 3, 1)]
NAMES = ("hidden", "weights", "gate_up_proj", "down_proj")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_case(tokens, top_k, num_experts, hidden_size, width, dtype=torch.float32, device="cpu"):
    """(hidden, weights, experts, gate_up_proj, down_proj), and the gradient of the result."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :top_k]
    weights = torch.softmax(normal(tokens, top_k, seed=2), -1)
    gate_up = (2 * normal(num_experts, 2 * width, hidden_size, seed=3) / hidden_size**0.5).to(dtype)
    down = (normal(num_experts, hidden_size, width, seed=4) / width**0.5).to(dtype)
    hidden, upstream = (normal(tokens, hidden_size, seed=seed).to(dtype) for seed in (5, 6))
    *operands, upstream = (x.to(device) for x in (hidden, weights, experts, gate_up, down, upstream))
    return tuple(operands), upstream


def cancelling_case(tokens, top_k, num_experts, half, half_width, dtype, device="cpu"):
    """The exact value of every sum is 0, so any other order of summation shows.

    This holds for up, for the result, and for the gradients by the activation, by hidden and by the weights.
    """
    (hidden, weights, experts, gate_up, down), upstream = random_case(
        tokens, top_k, num_experts, half, half_width, torch.float64, device
    )
    gate, up = gate_up.chunk(2, 1)
    # the remainder of a sum must not underflow in float16
    gate, up = torch.cat([gate, gate], 2) / 128, torch.cat([up, -up], 2) * 64
    down = torch.cat([down, -down], 2) * 2**15
    hidden, upstream = (64 * torch.cat([x, x], 1).to(dtype) for x in (hidden, upstream))
    gate_up, down = torch.cat([gate, gate, up, up], 1).to(dtype), torch.cat([down, -down], 1).to(dtype)
    return (hidden, weights, experts, gate_up, down), upstream


def forward_backward(operands, upstream, function, wanted=NAMES):
    """(result, its gradients by the `wanted` operands of NAMES)."""
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
    """moe_experts in the dtype of hidden, as an eager model computes it."""
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


def check_values_and_gradients(size, dtype, backend, device="cpu"):
    operands, upstream = random_case(*size, dtype, device)
    assert_exact(operands, upstream, ours(operands, upstream, backend))


def check_one_expert_for_every_rank_of_every_token(dtype, backend, device="cpu"):
    (hidden, weights, experts, gate_up, down), upstream = random_case(150, 2, 4, 40, 24, dtype, device)
    operands = (hidden, weights, torch.full_like(experts, 2), gate_up, down)
    results = ours(operands, upstream, backend)
    assert_exact(operands, upstream, results)
    for grad in results[-2:]:
        assert not grad[[0, 1, 3]].any()


def check_extreme_gates(dtype, backend, device="cpu"):
    """silu is exact at both ends: near 0 for very negative gates, and x for large gates.

    A sigmoid that underflows must give exactly 0, also times a large gate.
    """
    gates = torch.tensor([-6e4, -3e3, -200.0, -90, -87, -30, -17, 0, 17, 30, 88, 200, 3e3, 6e4], device=device)
    eye = torch.eye(len(gates), device=device)
    operands = (
        gates.diag().to(dtype),
        torch.ones_like(gates)[:, None],
        torch.zeros_like(gates, dtype=torch.int64)[:, None],
        # the gate of a token is its number in gates, and up is 1 / 64 of the gate
        torch.cat([eye, eye / 64])[None].to(dtype),
        eye[None].to(dtype),
    )
    upstream = torch.ones_like(eye).to(dtype)
    results = ours(operands, upstream, backend)
    assert_exact(operands, upstream, results)
    assert not results[0][:3].any()
    assert not any(grad.isnan().any() for grad in results)


def check_gradient_reaches_the_router(backend, device="cpu"):
    """The gradient goes from the experts' result to the router's logits, for natural and replayed experts."""
    operands, upstream = random_case(30, 3, 8, 24, 20, device=device)
    hidden, _, replayed, gate_up, down = operands
    logits = 2 * normal(30, 8, seed=9).to(device)
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


def check_a_token_in_any_batch_and_place(size, dtype, backend, device="cpu"):
    """A token has the same result, and gradients by hidden and weights, in every part of the batch.

    The case is a cancelling one of at least 70 tokens.
    """
    operands, upstream = cancelling_case(*size, dtype, device)

    def of(tokens):
        hidden, weights, experts, gate_up, down = operands
        part = (hidden[tokens], weights[tokens], experts[tokens], gate_up, down)
        return ours(part, upstream[tokens], backend, NAMES[:2])

    whole = of(torch.arange(size[0]))
    for values in whole:
        assert values.count_nonzero() > values.numel() // 2
    parts = [torch.tensor([token]) for token in (0, 1, 37, 69)]
    parts += [torch.arange(3, 6), torch.arange(5, 68), torch.randperm(70, generator=torch.Generator().manual_seed(0))]
    for tokens in parts:
        assert_same_bits(of(tokens), [values[tokens] for values in whole])


def check_non_finite_values_stay_in_their_token(wrong, backend, device="cpu"):
    operands, upstream = random_case(40, 2, 3, 33, 20, device=device)
    expected = ours(operands, upstream, backend)[:3]
    operands[0][17, 5] = wrong
    results = ours(operands, upstream, backend)[:3]
    rest = torch.arange(40) != 17
    assert_same_bits([values[rest] for values in results], [values[rest] for values in expected])
    assert not results[0][17].isfinite().any()


def check_nan_in_an_expert_reaches_its_own_tokens_alone(backend, device="cpu"):
    operands, upstream = random_case(40, 2, 5, 33, 20, device=device)
    expected = ours(operands, upstream, backend)
    _, _, experts, gate_up, down = operands
    gate_up[2], down[2] = float("nan"), float("nan")
    results = ours(operands, upstream, backend)
    rest = (experts != 2).all(-1)
    assert rest.any()
    assert not rest.all()
    assert_same_bits([values[rest] for values in results[:3]], [values[rest] for values in expected[:3]])
    others = [0, 1, 3, 4]  # expert 2 made NaN of their tokens' results, not of the tokens' gradients
    assert_same_bits([grad[others] for grad in results[3:]], [grad[others] for grad in expected[3:]])


def check_each_choice_of_gradients(count, backend, device="cpu"):
    operands, upstream = random_case(20, 2, 4, 33, 20, torch.bfloat16, device)
    everything = dict(zip(("out", *NAMES), ours(operands, upstream, backend), strict=True))
    for wanted in itertools.combinations(NAMES, count):
        results = ours(operands, upstream, backend, wanted)
        assert_same_bits(results, [everything[name] for name in ("out", *wanted)])


def check_nothing_is_kept_without_a_gradient(dtype, backend, device="cpu"):
    operands, upstream = random_case(20, 2, 4, 33, 20, dtype, device)
    hidden, weights, experts, gate_up, down = operands
    expected = ours(operands, upstream, backend)[0]
    ids = experts.contiguous()
    out, kept = torch.ops.minirl_kernels.moe_experts(hidden, weights, ids, gate_up, down, False, backend)
    assert torch.equal(out, expected)
    assert len(kept) == 0
    leaf = hidden.clone().requires_grad_()
    with torch.no_grad():
        out = moe_experts(leaf, (weights, experts), gate_up, down, backend=backend)
    assert torch.equal(out, expected)
    assert not out.requires_grad


def check_strides(dtype, backend, device="cpu", *, same_bits):
    """Every operand may be a slice of a wider buffer, and the upstream gradient may be expanded."""
    (hidden, weights, experts, gate_up, down), _ = random_case(20, 2, 4, 33, 20, dtype, device)
    expanded = torch.ones((), dtype=dtype, device=device).expand(20, 33)
    plain = ours((hidden, weights, experts, gate_up, down), expanded.contiguous(), backend)
    wide = hidden.new_full((20, 50), torch.nan)
    wide_gate_up = hidden.new_full((5, 43, 40), torch.nan)
    wide_down = hidden.new_full((33, 4, 29), torch.nan)
    wide[:, 7:40], wide_gate_up[1:, 3:, 2:35], wide_down[:, :, 9:] = hidden, gate_up, down.transpose(0, 1)
    sliced = (wide[:, 7:40], weights.T.contiguous().T, experts.T.contiguous().T, wide_gate_up[1:, 3:, 2:35])
    results = ours((*sliced, wide_down[:, :, 9:].transpose(0, 1)), expanded, backend)
    if same_bits:
        assert_same_bits(results, plain)
    for values, right in zip(results, plain, strict=True):
        torch.testing.assert_close(values, right)


def check_an_expert_out_of_range(wrong, backend, device="cpu"):
    """An expert id out of range gives NaN in the token and in the gradient of the pair's weight.

    The gradients of the projections leave the pair out. This is the behaviour on a backend that cannot raise.
    """
    (hidden, weights, experts, gate_up, down), upstream = random_case(140, 2, 4, 33, 20, device=device)
    expected = ours((hidden, weights, experts, gate_up, down), upstream, backend)
    pairs = [(13, 1), (13, 0), (139, 0)]
    replaced = experts.clone()
    for token, rank in pairs:
        replaced[token, rank] = wrong
    results = ours((hidden, weights, replaced, gate_up, down), upstream, backend)
    rest = torch.ones(140, dtype=torch.bool)
    rest[[13, 139]] = False
    assert_same_bits([values[rest] for values in results[:3]], [values[rest] for values in expected[:3]])
    assert all(values[~rest].isnan().all() for values in results[:2])
    assert results[2][[13, 13, 139], [1, 0, 0]].isnan().all()
    assert torch.equal(results[2][139, 1], expected[2][139, 1])
    # the expected gradients of the projections: the pairs belong to one additional expert
    more = [torch.cat([matrix, matrix[:1]]) for matrix in (gate_up, down)]
    elsewhere = ours((hidden, weights, replaced.where(replaced != wrong, 4), *more), upstream, backend)
    assert_same_bits(results[3:], [grad[:4] for grad in elsewhere[3:]])
