"""moe_routing against its definition and float64: natural and replayed experts, their weights, the gradient."""

import itertools
import math

import pytest
import torch
from dtypes import DTYPES
from policy_batches import assert_as_exact_as_eager, assert_same_bits, per_row_of_terms
from routing_cases import random_experts

from minirl_kernels import moe_routing
from minirl_kernels.backends import native
from minirl_kernels.ops.moe_routing.reference import moe_routing_reference

ID_DTYPES = [torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64]
SIZES = [(1, 1), (2, 2), (8, 2), (16, 16), (17, 3), (60, 4), (128, 8), (300, 22)]
KINDS = list(itertools.product(["softmax", "sigmoid"], [True, False]))
META = torch.device("meta")


def random_logits(tokens, num_experts, dtype=torch.float32, seed=0, spread=2.0):
    return (spread * torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed))).to(dtype)


def random_bias(num_experts):
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(2)) / 8


def forward_backward(logits, top_k, upstream, **options):
    logits = logits.detach().requires_grad_()
    routing = moe_routing(logits, top_k, **options)
    (grad,) = torch.autograd.grad(routing.weights, logits, upstream)
    return routing._replace(weights=routing.weights.detach()), grad


def by_reference(dtype, logits, top_k, upstream, **options):
    logits = logits.detach().to(dtype).requires_grad_()
    weights, *others = moe_routing_reference(logits, top_k, **options)
    (grad,) = torch.autograd.grad(weights, logits, upstream.to(weights.dtype))
    return (weights.detach(), *others), grad


def by_definition(x, top_k, replayed=None, *, norm=True, scoring="softmax", bias=None, groups=None, scale=1.0):
    """(weights, experts, natural experts, agreement, mass, margin) of one row, in Python's floats."""
    num_experts, everyone = len(x), range(len(x))
    exps = [math.exp(v) for v in x]
    scores = [e / sum(exps) if scoring == "softmax" else e / (1 + e) for e in exps]
    selection = x if bias is None and groups is None else [s + (bias[j] if bias else 0) for j, s in enumerate(scores)]
    candidates = list(everyone)
    if groups:
        num_groups, kept = groups
        size = num_experts // num_groups
        of_group = [sorted(selection[g * size : (g + 1) * size])[-2:] for g in range(num_groups)]
        best = sorted(range(num_groups), key=lambda g: (-sum(of_group[g]), g))[:kept]
        candidates = [j for j in everyone if j // size in best]
    order = sorted(candidates, key=lambda j: (-selection[j], j))
    natural = order[:top_k]
    chosen = natural if replayed is None else replayed
    total = sum(scores[j] for j in chosen)
    weights = [scale * scores[j] / (total if norm else 1) for j in chosen]
    margin = selection[order[top_k - 1]] - selection[order[top_k]] if top_k < len(order) else math.inf
    return weights, chosen, natural, len({*chosen} & {*natural}) / top_k, total / sum(scores), margin


@pytest.mark.parametrize("groups", [None, (1, 1), (4, 2), (3, 3)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scoring", "norm"), KINDS)
def test_definition(scoring, norm, with_bias, groups, backend):
    logits, experts = random_logits(12, 12), random_experts(12, 12, 3)
    valid = torch.arange(12) % 3 > 0
    bias = random_bias(12) if with_bias else None
    result = moe_routing(
        logits,
        3,
        routed_experts=experts,
        valid=valid,
        norm_topk_prob=norm,
        scoring=scoring,
        correction_bias=bias,
        num_groups=groups and groups[0],
        top_k_groups=groups and groups[1],
        scale=2.5,
        backend=backend,
    )
    assert [values.dtype for values in result] == [torch.float32, *[torch.int64] * 2, *[torch.float32] * 3]
    for row, x in enumerate(logits.double().tolist()):
        expected = by_definition(
            x,
            3,
            experts[row].tolist() if valid[row] else None,
            norm=norm,
            scoring=scoring,
            bias=bias.double().tolist() if with_bias else None,
            # one group means no groups
            groups=None if groups == (1, 1) else groups,
            scale=2.5,
        )
        for name, values, right in zip(result._fields, result, expected, strict=True):
            torch.testing.assert_close(
                values[row].double(),
                torch.tensor(right).double(),
                rtol=1e-5,
                atol=2e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_values_and_gradients(num_experts, top_k, dtype, backend):
    logits, experts = random_logits(9, num_experts, dtype), random_experts(9, num_experts, top_k)
    upstream = random_logits(9, top_k, seed=3)
    for (scoring, norm), bias, replayed in itertools.product(KINDS, (None, random_bias(num_experts)), (None, experts)):
        options = {
            "routed_experts": replayed,
            "norm_topk_prob": norm,
            "scoring": scoring,
            "correction_bias": bias,
            "scale": 1.7,
        }
        ours, grad = forward_backward(logits, top_k, upstream, backend=backend, **options)
        exact, exact_grad = by_reference(torch.float64, logits, top_k, upstream, **options)
        eager, eager_grad = by_reference(dtype, logits, top_k, upstream, **options)
        for values, theirs, truth in zip(ours, eager, exact, strict=True):
            if values.dtype == torch.int64:
                assert torch.equal(values, truth)
            elif values is ours.margin:
                assert torch.equal(values.isinf(), truth.isinf())
                finite = truth.isfinite()
                # the error of the margin, a difference of scores, is relative to the largest possible score
                assert_as_exact_as_eager(values[finite], theirs[finite], truth[finite], torch.ones(()))
            else:
                assert_as_exact_as_eager(values, theirs, truth)
        assert_as_exact_as_eager(grad, eager_grad, exact_grad, per_row_of_terms(exact[0], upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scoring", "norm"), KINDS)
def test_replaying_the_natural_experts_changes_no_bit(scoring, norm, dtype, backend):
    """With ids of any dtype; otherwise |log r| would not be exactly 0 in the first mini-batch."""
    logits, upstream = random_logits(200, 60, dtype), random_logits(200, 8, seed=3)
    options = {"norm_topk_prob": norm, "scoring": scoring, "correction_bias": random_bias(60), "backend": backend}
    natural, grad = forward_backward(logits, 8, upstream, **options)
    for ids_dtype in ID_DTYPES:
        experts = natural.experts.to(ids_dtype)
        for valid in (None, torch.rand(200) < 0.5):
            replay, replay_grad = forward_backward(logits, 8, upstream, routed_experts=experts, valid=valid, **options)
            assert_same_bits((*replay, replay_grad), (*natural, grad))
    assert bool((natural.agreement == 1).all())


@pytest.mark.parametrize(("scoring", "norm"), KINDS)
def test_what_gets_gradient(scoring, norm, backend):
    """Normalised weights and sigmoids depend on the chosen logits only; a softmax over all experts, on all logits."""
    logits, experts = random_logits(5, 20), random_experts(5, 20, 4)
    bias = random_bias(20).requires_grad_()
    leaf = logits.requires_grad_()
    routing = moe_routing(
        leaf, 4, routed_experts=experts, norm_topk_prob=norm, scoring=scoring, correction_bias=bias, backend=backend
    )
    assert [values.requires_grad for values in routing] == [True, *[False] * 5]
    routing.weights.backward(random_logits(5, 4, seed=3))
    reached = leaf.grad != 0
    is_chosen = torch.zeros_like(reached).scatter(1, experts, True)
    assert torch.equal(reached, is_chosen if norm or scoring == "sigmoid" else torch.ones_like(reached))
    assert bias.grad is None
    assert not moe_routing(leaf.detach(), 4, correction_bias=bias, backend=backend).weights.requires_grad


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replayed_experts_whose_scores_underflow(dtype, scoring, backend):
    """A softmax over all experts, gathered and renormalised, would give 0 / 0 for them."""
    logits = torch.full((2, 128), -200.0, dtype=dtype)
    logits[:, 0], logits[:, 5], logits[:, 6] = 120.0, -149.0, -150.0
    experts = torch.tensor([[5, 6], [6, 5]])
    assert torch.softmax(logits.float(), -1).gather(1, experts).sum() == 0
    routing, grad = forward_backward(
        logits, 2, torch.tensor([[1.0, 0.0]] * 2), routed_experts=experts, scoring=scoring, backend=backend
    )
    expected = torch.tensor([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])
    torch.testing.assert_close(routing.weights, torch.stack([expected, expected.flip(0)]))
    assert not routing.mass.any()
    slope = (expected[0] * expected[1]).to(dtype)
    torch.testing.assert_close(grad[:, 5:7], torch.stack([slope, -slope, -slope, slope]).view(2, 2))


def test_sigmoids_that_all_underflow_have_weights_and_mass(backend):
    logits = random_logits(3, 16) - 300
    expected = torch.softmax(logits.double(), -1)  # a sigmoid far below 0 is an exponential
    routing = moe_routing(logits, 4, scoring="sigmoid", backend=backend)
    chosen = expected.gather(1, routing.experts)
    torch.testing.assert_close(routing.mass.double(), chosen.sum(-1), rtol=3e-5, atol=0)
    torch.testing.assert_close(routing.weights.double(), chosen / chosen.sum(-1, keepdim=True), rtol=3e-5, atol=0)


@pytest.mark.parametrize("ids_dtype", ID_DTYPES, ids=str)
def test_ids_of_any_width_and_stride(ids_dtype, backend):
    """A slice of ids [tokens, layers, K] and a slice of logits are read without a copy."""
    experts = torch.stack([random_experts(7, 90, 3, seed) for seed in range(4)], 1)
    buffer = random_logits(7, 100)
    for layer in range(4):
        ours = moe_routing(buffer[:, 5:95], 3, routed_experts=experts.to(ids_dtype)[:, layer], backend=backend)
        alone = moe_routing(buffer[:, 5:95].clone(), 3, routed_experts=experts[:, layer].clone(), backend=backend)
        assert_same_bits(ours, alone)
        assert torch.equal(ours.experts, experts[:, layer])


def test_ids_past_256(backend):
    logits, experts = random_logits(6, 700), random_experts(6, 700, 5) % 300 + 400
    experts = experts[(experts.sort(-1).values.diff(dim=-1) > 0).all(-1)]
    assert len(experts) > 2
    logits = logits[: len(experts)]
    narrow = moe_routing(logits, 5, routed_experts=experts.to(torch.uint16), backend=backend)
    assert torch.equal(narrow.experts, experts)
    assert_same_bits(narrow, moe_routing(logits, 5, routed_experts=experts, backend=backend))


def test_ties_go_to_the_lower_id(backend):
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -0.0, 0.0], [-0.0, 0.0, -1.0, -1.0, -0.0, 0.0]])
    routing = moe_routing(logits, 4, backend=backend)
    assert routing.experts.tolist() == [[1, 2, 3, 0], [0, 1, 4, 5]]
    assert routing.margin.tolist() == [0.0, 1.0]
    tied = moe_routing(
        torch.zeros(1, 12), 3, scoring="sigmoid", num_groups=4, top_k_groups=2, correction_bias=torch.zeros(12),
        backend=backend,
    )  # fmt: skip
    assert tied.experts.tolist() == [[0, 1, 2]]


def test_margin_where_nothing_follows(backend):
    assert moe_routing(random_logits(3, 5), 5, backend=backend).margin.tolist() == [math.inf] * 3
    grouped = moe_routing(random_logits(3, 12), 6, num_groups=4, top_k_groups=2, backend=backend)
    assert grouped.margin.tolist() == [math.inf] * 3
    logits = torch.tensor([[1.0, -math.inf, -math.inf, 2.0], [1.0, 0.0, -math.inf, 2.0]])
    assert moe_routing(logits, 3, backend=backend).margin.tolist() == [0.0, math.inf]


def test_logits_of_minus_infinity(backend):
    """An expert with a logit of -inf has weight 0, no gradient and no mass."""
    logits = torch.tensor([[1.0, -math.inf, 0.0, -math.inf], [-math.inf, 3.0, -math.inf, -math.inf]])
    experts = torch.tensor([[0, 1], [2, 1]])
    for scoring, norm in KINDS:
        routing, grad = forward_backward(
            logits, 2, torch.ones(2, 2), routed_experts=experts, scoring=scoring, norm_topk_prob=norm, backend=backend
        )
        assert routing.weights[0, 1] == routing.weights[1, 0] == 0
        assert bool((routing.weights[[0, 1], [0, 1]] > 0).all())
        assert not grad.masked_select(logits.isinf()).any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(("scoring", "norm"), KINDS)
def test_what_is_no_number_stays_in_its_row(scoring, norm, wrong, backend):
    logits, upstream = random_logits(5, 40), random_logits(5, 4, seed=3)
    options = {"scoring": scoring, "norm_topk_prob": norm, "correction_bias": random_bias(40), "backend": backend}
    expected, expected_grad = forward_backward(logits, 4, upstream, **options)
    logits[2, 7] = wrong
    routing, grad = forward_backward(logits, 4, upstream, **options)
    rest = [0, 1, 3, 4]
    assert_same_bits([values[rest] for values in (*routing, grad)], [v[rest] for v in (*expected, expected_grad)])
    ids = routing.experts[2]
    assert len(ids.unique()) == 4
    assert bool(((ids >= 0) & (ids < 40)).all())
    if math.isnan(wrong) or scoring == "softmax":
        assert routing.weights[2].isnan().all()
        assert grad[2].isnan().any()


def test_rows_that_are_not_valid_route_naturally(backend):
    logits, experts = random_logits(6, 20), random_experts(6, 20, 4)
    valid = torch.tensor([True, False, True, False, False, True])
    natural = moe_routing(logits, 4, backend=backend)
    replayed = moe_routing(logits, 4, routed_experts=experts, backend=backend)
    for garbage in (-1, 20, 2**40, 3):  # the last value repeats an expert
        mixed = moe_routing(
            logits, 4, routed_experts=experts.where(valid[:, None], garbage), valid=valid, check=True, backend=backend
        )
        for values, by_replay, by_nature in zip(mixed, replayed, natural, strict=True):
            mask = valid.view(-1, *[1] * (values.dim() - 1))
            assert torch.equal(values, by_replay.where(mask, by_nature))


def test_replayed_experts_keep_their_order(backend):
    logits, experts = random_logits(6, 20), random_experts(6, 20, 4)
    forward = moe_routing(logits, 4, routed_experts=experts, backend=backend)
    flipped = moe_routing(logits, 4, routed_experts=experts.flip(1), backend=backend)
    assert torch.equal(flipped.experts, experts.flip(1))
    torch.testing.assert_close(flipped.weights, forward.weights.flip(1), rtol=1e-6, atol=0)
    assert torch.equal(flipped.agreement, forward.agreement)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    ("row", "dtype", "said"),
    [
        ([3, 20, 1], torch.uint8, r"has the expert 20 at row 4: an expert must be in \[0, 20\)"),
        ([3, 5, -1], torch.int16, r"has the expert -1 at row 4: .* must be marked in valid"),
        ([3, 2**32 + 5, 1], torch.int64, "has the expert 4294967301 at row 4: "),
        ([3, 300, 1], torch.uint16, "has the expert 300 at row 4: "),
        ([3, 7, 3], torch.uint8, r"has the expert 3 twice at row 4 \(\[3, 7, 3\]\): the experts of a row must differ"),
        ([0, 0, 0], torch.int32, "has the expert 0 twice at row 4 "),
    ],
)
def test_experts_that_cannot_be(row, dtype, said, check, backend):
    experts = random_experts(6, 20, 3)
    experts[4] = torch.tensor(row)
    with pytest.raises(ValueError, match=rf"^routed_experts {said}"):
        moe_routing(random_logits(6, 20), 3, routed_experts=experts.to(dtype), check=check, backend=backend)


def test_the_first_bad_row_is_named(backend, threads):
    threads(2)
    experts = random_experts(4000, 20, 3)
    experts[1234, 2], experts[3999, 0] = 20, 20
    with pytest.raises(ValueError, match="at row 1234: "):
        moe_routing(random_logits(4000, 20), 3, routed_experts=experts, backend=backend)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens, replay, backend):
    experts = random_experts(tokens, 9, 2) if replay else None
    routing, grad = forward_backward(
        random_logits(tokens, 9), 2, torch.ones(tokens, 2), routed_experts=experts, backend=backend
    )
    assert [tuple(values.shape) for values in routing] == [(tokens, 2)] * 3 + [(tokens,)] * 3
    assert grad.shape == (tokens, 9)


def sensitive(tokens, num_experts, dtype):
    """One expert is far above the others, so the small mass of the others shows the last bits of their sum."""
    logits = random_logits(tokens, num_experts, dtype)
    logits[:, 0] += 6
    return logits, random_experts(tokens, num_experts - 1, 5) + 1


def all_bits(logits, experts, **options):
    upstream = 1 - torch.arange(5.0).expand(len(logits), 5)
    results = []
    for (scoring, norm), replayed in itertools.product(KINDS, (None, experts)):
        options = {"scoring": scoring, "norm_topk_prob": norm, "correction_bias": random_bias(logits.shape[1])}
        routing, grad = forward_backward(logits, 5, upstream, routed_experts=replayed, **options, backend="cpu")
        results += [*routing, grad]
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_experts", [9, 64, 301])
def test_on_every_instruction_set(num_experts, dtype, cpu, set_isa):
    logits, experts = sensitive(40, num_experts, dtype)
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        results.append(all_bits(logits, experts))
    for result in results[1:]:
        assert_same_bits(result, results[0])


def test_threads(cpu, threads):
    logits, experts = sensitive(3000, 130, torch.bfloat16)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(all_bits(logits, experts))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_any_batch_and_place(dtype, cpu):
    logits, experts = sensitive(12, 130, dtype)
    together = all_bits(logits, experts)
    for row in range(12):
        assert_same_bits(all_bits(logits[row : row + 1], experts[row : row + 1]), [v[row : row + 1] for v in together])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_same_bits(all_bits(logits[order], experts[order]), [values[order] for values in together])


def test_more_than_65535_tokens(cpu):
    logits, experts = random_logits(70_001, 6), random_experts(70_001, 6, 2)
    whole = moe_routing(logits, 2, routed_experts=experts.to(torch.uint8), backend=cpu)
    tail = moe_routing(logits[-3:], 2, routed_experts=experts[-3:], backend=cpu)
    assert_same_bits([values[-3:] for values in whole], tail)


def test_rows_more_than_2_to_the_31_elements_apart(tmp_path, cpu):
    """Rows lie more than 2^31 elements apart in a sparse file."""
    stride = 2**31 + 64
    rows = random_logits(2, 40, torch.bfloat16)
    file = torch.from_file(str(tmp_path / "logits"), shared=True, size=stride + 40, dtype=torch.bfloat16)
    logits = file.as_strided((2, 40), (stride, 1))
    logits.copy_(rows)
    upstream = random_logits(2, 4, seed=3)
    for norm in (True, False):
        far, far_grad = forward_backward(logits, 4, upstream, norm_topk_prob=norm, backend=cpu)
        near, near_grad = forward_backward(rows, 4, upstream, norm_topk_prob=norm, backend=cpu)
        assert_same_bits((*far, far_grad), (*near, near_grad))


def test_gradient_may_be_taken_twice(backend):
    leaf = random_logits(6, 20).requires_grad_()
    weights = moe_routing(leaf, 4, backend=backend).weights
    first, second = (torch.autograd.grad(weights[:, 0].sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_under_autocast(dtype, backend):
    logits, upstream = random_logits(6, 20, dtype), random_logits(6, 4, seed=3)
    expected, expected_grad = forward_backward(logits, 4, upstream, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing, grad = forward_backward(logits, 4, upstream, backend=backend)
    assert_same_bits((*routing, grad), (*expected, expected_grad))


LOGITS = torch.zeros(3, 8)
EXPERTS = torch.tensor([[0, 1], [2, 3], [4, 5]])
VALID = torch.ones(3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"router_logits": LOGITS.double()}, TypeError, "router_logits", "torch.float64", "float32, bfloat16"),
        ({"router_logits": LOGITS[0]}, ValueError, "router_logits", r"\(8,\)", r"\[T, D\]"),
        ({"router_logits": LOGITS[None]}, ValueError, "router_logits", r"\(1, 3, 8\)", r"\[T, E\]"),
        ({"router_logits": LOGITS.mT}, ValueError, "router_logits", r"\(1, 8\)", "contiguous"),
        ({"router_logits": torch.zeros(3, 4097)}, ValueError, "router_logits", "4097", "at most 4096"),
        ({"top_k": 0}, ValueError, "top_k", "0", "from 1 to .* 8"),
        ({"top_k": 9}, ValueError, "top_k", "9", "from 1 to .* 8"),
        ({"top_k": 2.0}, TypeError, "top_k", r"2\.0", "an integer"),
        ({"routed_experts": EXPERTS.float()}, TypeError, "routed_experts", "float32", "integers"),
        ({"routed_experts": EXPERTS.tolist()}, TypeError, "routed_experts", "list", "a tensor"),
        ({"routed_experts": EXPERTS[:2]}, ValueError, "routed_experts", r"\(2, 2\)", r"\(3, 2\)"),
        ({"routed_experts": EXPERTS[:, :1]}, ValueError, "routed_experts", r"\(3, 1\)", r"\(3, 2\)"),
        ({"routed_experts": EXPERTS.to(META)}, ValueError, "routed_experts", "meta", "cpu"),
        ({"valid": VALID.int()}, TypeError, "valid", "int32", "bool"),
        ({"valid": VALID[:2]}, ValueError, "valid", r"\(2,\)", r"\(3,\)"),
        ({"routed_experts": None, "valid": VALID}, ValueError, "valid", "without routed_experts", "None"),
        ({"scoring": "tanh"}, ValueError, "scoring", "'tanh'", "'softmax' or 'sigmoid'"),
        ({"correction_bias": torch.zeros(7)}, ValueError, "correction_bias", r"\(7,\)", r"\(8,\)"),
        ({"correction_bias": torch.zeros(8).int()}, TypeError, "correction_bias", "int32", "floating point"),
        ({"num_groups": 4}, ValueError, "num_groups", "4 and top_k_groups None: both or neither", "be given"),
        ({"num_groups": 3, "top_k_groups": 1}, ValueError, "num_groups", "3", "divide the 8 experts"),
        ({"num_groups": 8, "top_k_groups": 4}, ValueError, "num_groups", "8", "groups of two or more"),
        ({"num_groups": 4, "top_k_groups": 5}, ValueError, "top_k_groups", "5", "from 1 to num_groups, 4"),
        ({"num_groups": 4, "top_k_groups": 1, "top_k": 3}, ValueError, "top_k", "3", "at most the 2 experts"),
        ({"scale": 0}, ValueError, "scale", "0", "above 0"),
        ({"scale": math.nan}, ValueError, "scale", "nan", "above 0"),
        ({"scale": "1"}, TypeError, "scale", "'1'", "a number"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    good = {"router_logits": LOGITS, "top_k": 2, "routed_experts": EXPERTS, "valid": VALID, "backend": backend}
    moe_routing(**good)
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        moe_routing(**{**good, **bad})


def test_the_cpu_backend_refuses_tensors_of_another_device():
    with pytest.raises(RuntimeError, match="'cpu' is unavailable"):
        moe_routing(LOGITS.to(META), 2, backend="cpu")
