"""Cases for the tests of attention, and checks of them, for the CPU, Triton's interpreter and a GPU."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from linear_head import assert_matrices_as_exact
from policy_batches import assert_same_bits
from torch.nn import functional as F

from minirl_kernels import attention
from minirl_kernels.ops.attention import attention_over_spans


@dataclass
class Case:
    """Packed sequences.

    q is [Tq, Hq, D], k and v are [Tk, Hkv, ...]. upstream is the gradient of the result. queries and keys are the
    lengths of each sequence.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    upstream: torch.Tensor
    queries: list[int]
    keys: list[int]
    causal: bool = True
    scale: float | None = None

    def offsets(self, lengths) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.q.device)

    def part(self, sequence: int, first: int = 0, last: int | None = None) -> Case:
        """Queries first .. last - 1 of one sequence, with the keys that the last of these queries sees."""
        queries, keys = self.queries[sequence], self.keys[sequence]
        last = queries if last is None else last
        seen = keys - queries + last
        q0, k0 = sum(self.queries[:sequence]), sum(self.keys[:sequence])
        rows, columns = slice(q0 + first, q0 + last), slice(k0, k0 + seen)
        return replace(
            self,
            q=self.q[rows],
            k=self.k[columns],
            v=self.v[columns],
            upstream=self.upstream[rows],
            queries=[last - first],
            keys=[seen],
        )

    def in_float64(self) -> Case:
        return replace(self, **{name: getattr(self, name).double() for name in ("q", "k", "v", "upstream")})


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_case(queries, keys=None, *, heads=4, key_heads=2, size=32, value_size=None, dtype=torch.float32, **options):
    device = options.pop("device", "cpu")
    keys = queries if keys is None else keys
    total, value_size = sum(keys), value_size or size
    tensors = {
        "q": normal(sum(queries), heads, size, seed=1),
        "k": normal(total, key_heads, size, seed=2),
        "v": normal(total, key_heads, value_size, seed=3),
        "upstream": normal(sum(queries), heads, value_size, seed=4),
    }
    return Case(**{name: x.to(dtype).to(device) for name, x in tensors.items()}, queries=queries, keys=keys, **options)


def cancelling_case(queries, keys=None, **options):
    """A case whose results show the order of every sum.

    The exact scores are 0, so only rounding is left of them. A large scale turns this rounding into unequal weights.
    The gradients by the weights are built in the same way.
    """
    case = random_case(queries, keys, **options)
    size, value_size = case.q.shape[-1] // 2, case.v.shape[-1] // 2
    generator = torch.Generator().manual_seed(5)
    shuffled, values_shuffled = (torch.randperm(2 * n, generator=generator) for n in (size, value_size))

    def twice(x, size, order, sign=1):
        return torch.cat([x[..., :size], sign * x[..., :size]], -1)[..., order]

    # a score of 16-bit operands has a smaller rounding error, because its terms have fewer digits
    scale = 2.0**17 if case.q.dtype == torch.float32 else 2.0**19
    return replace(
        case,
        q=twice(case.q, size, shuffled),
        k=twice(case.k, size, shuffled, -1),
        # the remainder of a sum must not underflow in float16
        v=32 * twice(case.v, value_size, values_shuffled, -1),
        upstream=32 * twice(case.upstream, value_size, values_shuffled),
        scale=scale,
    )


def cancelling_values(case):
    """All weights are 1, and the exact sum of every 64 values is 0.

    The exponents of the values lie far apart, so rounding shows the order of the sum.
    """
    generator = torch.Generator().manual_seed(9)
    total, heads, size = case.v.shape
    # the exponents span more bits than float32 has beyond the dtype's digits, within the range of float16
    spread = 20 if case.v.dtype == torch.bfloat16 else 13
    exponents = torch.randint(-spread, spread, (32, 1, 1), generator=generator)
    half = torch.randn(32, heads, size, generator=generator) * 2.0**exponents
    values = torch.cat([half, -half])[torch.randperm(64, generator=generator)].to(case.v.dtype)
    return replace(case, k=torch.zeros_like(case.k), v=values.repeat(total // 64 + 1, 1, 1)[:total], scale=None)


def forward_backward(case, function, wanted=("q", "k", "v")):
    """(result, its gradients by the `wanted` operands)."""
    leaves = {name: getattr(case, name).detach().requires_grad_(name in wanted) for name in ("q", "k", "v")}
    out = function(replace(case, **leaves))
    grads = torch.autograd.grad(out, [leaves[name] for name in wanted], case.upstream)
    return out.detach(), *(grad.detach() for grad in grads)


def ours(case, backend="cpu", wanted=("q", "k", "v")):
    def function(case):
        return attention(
            case.q,
            case.k,
            case.v,
            cu_seqlens_q=case.offsets(case.queries),
            cu_seqlens_k=case.offsets(case.keys),
            causal=case.causal,
            scale=case.scale,
            backend=backend,
        )

    return forward_backward(case, function, wanted)


def equations(case):
    """Attention in the dtype of q, as an eager model computes it.

    The weights are rounded to that dtype, and rows without keys are 0.
    """
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    outs, q0, k0 = [], 0, 0
    for queries, keys in zip(case.queries, case.keys, strict=True):
        q = case.q[q0 : q0 + queries].transpose(0, 1)
        group = case.q.shape[1] // case.k.shape[1]
        k, v = (x[k0 : k0 + keys].transpose(0, 1).repeat_interleave(group, 0) for x in (case.k, case.v))
        seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        seen = seen.tril(keys - queries) if case.causal else seen
        scores = (q @ k.mT * scale).masked_fill(~seen, torch.finfo(q.dtype).min)
        weights = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)) * seen
        outs.append((weights.to(q.dtype) @ v).transpose(0, 1))
        q0, k0 = q0 + queries, k0 + keys
    return torch.cat(outs)


def check_values_and_gradients(case, backend):
    results = ours(case, backend)
    exact = forward_backward(case.in_float64(), equations)
    eager = forward_backward(case, equations)
    for actual, theirs, truth in zip(results, eager, exact, strict=True):
        assert_matrices_as_exact(actual, theirs, truth)


def check_each_choice_of_gradients(case, backend):
    everything = dict(zip(("out", "q", "k", "v"), ours(case, backend), strict=True))
    for count in (1, 2):
        for wanted in itertools.combinations("qkv", count):
            results = ours(case, backend, wanted)
            assert_same_bits(results, [everything[name] for name in ("out", *wanted)])


def rows_of(case, sequence, first=0, last=None):
    start = sum(case.queries[:sequence])
    last = case.queries[sequence] if last is None else last
    return slice(start + first, start + last)


def parts_of(case):
    """(sequence, first, last) of single queries at many places, of prefixes, of chunks and of whole sequences."""
    for sequence, queries in enumerate(case.queries):
        ends = {1, 2, queries // 2, queries - 1, queries} | {n for n in (63, 64, 65, 128, 256, 257) if n <= queries}
        for last in sorted(ends - {0}):
            yield sequence, last - 1, last
            yield sequence, 0, last
        yield sequence, queries // 3, queries


def check_a_query_in_any_batch(case, backend):
    """A query has the same result and gradient alone, in a prefix, in a chunk and in the whole batch."""
    whole = ours(case, backend, ("q",))
    # most values must not be 0; the first query sees one key, so its gradient is 0, and many bfloat16 sums are exact
    assert all(values.count_nonzero() > values.numel() // 4 for values in whole)
    for sequence, first, last in parts_of(case):
        rows = rows_of(case, sequence, first, last)
        assert_same_bits(ours(case.part(sequence, first, last), backend, ("q",)), [values[rows] for values in whole])


def torch_varies(case) -> bool:
    """Whether a query has other bits in torch's attention when it is decoded."""
    group = case.q.shape[1] // case.k.shape[1]

    def stock(part):
        q, k, v = (x.transpose(0, 1)[None] for x in (part.q, part.k, part.v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        causal = q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=part.scale)[0].transpose(0, 1)

    for sequence, queries in enumerate(case.queries):
        whole = stock(case.part(sequence))
        for last in range(2, queries + 1, 7):
            if not torch.equal(stock(case.part(sequence, last - 1, last))[0], whole[last - 1]):
                return True
    return False


def check_sequences_in_any_batch(case, backend):
    """A sequence has the same result and gradients alone and among the others in another order."""
    whole = ours(case, backend)
    order = list(range(len(case.queries)))[::-1]
    parts = [case.part(sequence) for sequence in order]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("q", "k", "v", "upstream")}
    turned = replace(case, **joined, queries=case.queries[::-1], keys=case.keys[::-1])
    out = ours(turned, backend)
    for place, sequence in enumerate(order):
        q_rows, k_rows = rows_of(case, sequence), rows_of(replace(case, queries=case.keys), sequence)
        expected = [values[rows] for values, rows in zip(whole, (q_rows, q_rows, k_rows, k_rows), strict=True)]
        assert_same_bits(ours(parts[place], backend), expected)
        q_rows, k_rows = rows_of(turned, place), rows_of(replace(turned, queries=turned.keys), place)
        moved = [values[rows] for values, rows in zip(out, (q_rows, q_rows, k_rows, k_rows), strict=True)]
        assert_same_bits(moved, expected)


def padded(case, *, left, by_head):
    """(q, k, v, upstream, spans): [B, heads, rows, size] with NaN in the padding.

    left: the padding comes first. by_head: the rows of a head are contiguous, as in a cache. Otherwise the heads of a
    token are contiguous.
    """
    device = case.q.device
    spans = torch.zeros(len(case.queries), 5, dtype=torch.int64, device=device)
    spans[:, 0] = torch.arange(len(case.queries))

    def lay_out(x, lengths, column):
        width = max(lengths) + 3
        shape = (len(lengths), x.shape[1], width, x.shape[2])
        if by_head:
            out = x.new_full(shape, torch.nan)
        else:
            out = x.new_full((shape[0], width, shape[1], shape[3]), torch.nan).transpose(1, 2)
        start = 0
        for row, length in enumerate(lengths):
            first = width - length if left else 0
            out[row, :, first : first + length] = x[start : start + length].transpose(0, 1)
            spans[row, column], spans[row, column + 1] = first, length
            start += length
        return out

    q, upstream = (lay_out(x, case.queries, 1) for x in (case.q, case.upstream))
    k, v = (lay_out(x, case.keys, 3) for x in (case.k, case.v))
    return q, k, v, upstream.transpose(1, 2), spans


def check_padded_layouts(case, backend):
    """A padded batch gives the bits of packed sequences, and 0 in the padding, for both sides and both layouts."""
    expected = ours(case, backend)
    for left, by_head in itertools.product((False, True), repeat=2):
        q, k, v, upstream, spans = padded(case, left=left, by_head=by_head)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention_over_spans(*leaves, spans, causal=case.causal, scale=case.scale, backend=backend)
        grads = torch.autograd.grad(out, leaves, upstream)
        of_queries, of_keys = (1, case.queries), (3, case.keys)
        layouts = (of_queries, of_queries, of_keys, of_keys)
        for values, right, (column, lengths) in zip((out.transpose(1, 2), *grads), expected, layouts, strict=True):
            inside = torch.zeros(values.shape[0], values.shape[2], dtype=torch.bool, device=values.device)
            for row, length in enumerate(lengths):
                first = spans[row, column]
                inside[row, first : first + length] = True
            by_token = values.detach().transpose(1, 2)
            assert torch.equal(by_token[inside], right)
            assert not by_token[~inside].any()


def check_queries_without_keys(dtype, backend, device="cpu"):
    """Queries that see no key give 0 and get no gradient.

    They are the first queries of a sequence with fewer keys, and all queries of a sequence without keys.
    """
    case = random_case([15, 4, 0], [12, 0, 3], dtype=dtype, device=device)
    check_values_and_gradients(case, backend)
    out, grad_q, grad_k, grad_v = ours(case, backend)
    nothing = [0, 1, 2, 15, 16, 17, 18]
    assert not out[nothing].any()
    assert not grad_q[nothing].any()
    assert out[3:15].all()
    assert not grad_k[12:].any()
    assert not grad_v[12:].any()


def check_extreme_scores(backend, device="cpu"):
    """Scores of up to 1e4 on both sides of 0, whose softmax selects one key; and scores that are all far from 0."""
    case = random_case([70], heads=2, key_heads=1, size=8, device=device)
    case.q[...], case.k[...] = 0, 0
    case.q[..., 0], case.k[..., 0] = 100, 100 * normal(70, 1, seed=7).to(device)
    results = ours(replace(case, scale=1.0), backend)
    chosen = case.k[:, 0, 0].cummax(0).indices
    assert torch.equal(results[0], case.v[chosen].expand(-1, 2, -1))
    assert all(values.isfinite().all() for values in results)
    shifted = random_case([70], heads=2, key_heads=1, size=8, device=device)
    shifted.k[..., -1] += 1000
    shifted.q[..., -1] = 100
    # the gradients are not compared: for q and k they are 1000 times a sum that is exactly 0
    exact = equations(shifted.in_float64())
    assert_matrices_as_exact(ours(shifted, backend)[0], equations(shifted), exact)


def check_nan_stays_in_its_rows(backend, device="cpu"):
    """A NaN in a query reaches its own result only; one in a key or value, the queries of its sequence that see it."""
    case = random_case([30, 40], device=device)
    expected = ours(case, backend)[0]
    for name in ("q", "k", "v"):
        wrong = replace(case, **{name: getattr(case, name).clone()})
        getattr(wrong, name)[45] = torch.nan
        out = ours(wrong, backend)[0]
        touched = slice(45, 46) if name == "q" else slice(45, 70)
        assert out[touched].isnan().all()
        rest = slice(0, 30)
        assert torch.equal(out[rest], expected[rest])
        if name == "q":
            assert torch.equal(out[46:], expected[46:])
