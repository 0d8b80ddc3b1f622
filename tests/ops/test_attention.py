"""attention against float64 and eager torch: results, gradients, and bits that do not depend on the batch."""

import pytest
import torch
from attention_cases import (
    cancelling_case,
    cancelling_values,
    check_a_query_in_any_batch,
    check_each_choice_of_gradients,
    check_extreme_scores,
    check_nan_stays_in_its_rows,
    check_padded_layouts,
    check_queries_without_keys,
    check_sequences_in_any_batch,
    check_values_and_gradients,
    normal,
    ours,
    random_case,
    torch_varies,
)
from dtypes import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_batches import assert_same_bits

from minirl_kernels import attention
from minirl_kernels.backends import native
from minirl_kernels.ops.attention import attention_over_spans

# sizes around blocks of keys (256) and of stacked queries (252), around groups and vectors, and indivisible ones
SHAPES = [
    {"queries": [7, 1, 30], "size": 16},
    {"queries": [300, 5], "heads": 6, "key_heads": 2, "size": 24, "value_size": 40},
    {"queries": [1, 2, 1], "keys": [257, 20, 600], "heads": 8, "key_heads": 1, "size": 64},
    {"queries": [140, 3], "keys": [270, 90], "heads": 2, "key_heads": 2, "size": 7, "value_size": 1},
    {"queries": [3, 9], "keys": [5, 20], "causal": False, "size": 256},
    {"queries": [20], "heads": 300, "key_heads": 1, "size": 8},
]
META = torch.device("meta")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, dtype, backend):
    check_values_and_gradients(random_case(**shape, dtype=dtype), backend)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_every_instruction_set(dtype, isa, set_isa):
    if isa not in native().isa_supported():
        pytest.skip(f"this processor does not run {isa}, or this build has it not")
    set_isa(isa)
    check_values_and_gradients(random_case([270, 20], dtype=dtype, size=40), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_equal_on_tables_with_a_fused_multiply_add(dtype, set_isa):
    case = cancelling_case([80, 20], dtype=dtype, size=40)
    results = []
    # AMX adds bfloat16 products in another order
    for isa in sorted(set(native().isa_supported()) - {"baseline"} - ({"amx"} if dtype == torch.bfloat16 else set())):
        set_isa(isa)
        results.append(ours(case))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_without_keys(dtype, backend):
    check_queries_without_keys(dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_one_key_has_no_gradient(dtype, cpu):
    """The gradient is exactly 0. Two orders of one sum would leave a difference."""
    _, grad_q, grad_k, _ = ours(random_case([1, 40, 1], heads=6, key_heads=2, size=128, dtype=dtype), cpu)
    assert not grad_q[[0, 1, 41]].any()
    assert not grad_k[[0, 41]].any()
    assert grad_q[2:41].any()


def test_no_tokens(backend):
    case = random_case([], size=8)
    assert [values.shape for values in ours(case, backend)] == [(0, 4, 8), (0, 4, 8), (0, 2, 8), (0, 2, 8)]
    case = random_case([0, 0, 3, 0], size=8)
    assert_same_bits(ours(case, backend), ours(case.part(2), backend))


def test_extreme_scores(backend):
    check_extreme_scores(backend)


def test_what_is_no_number_stays_in_its_rows(backend):
    check_nan_stays_in_its_rows(backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_in_any_batch(dtype, cpu):
    case = cancelling_case([300, 65, 9, 130], dtype=dtype)
    # torch keeps the bits of 16-bit queries on some machines: the order of summation shows less in 16 bits
    assert dtype != torch.float32 or torch_varies(case), "torch's attention is invariant here: this shows nothing"
    check_a_query_in_any_batch(case, cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_over_values_in_any_batch(dtype, cpu):
    case = cancelling_values(random_case([320, 64], dtype=dtype, size=16))
    assert torch_varies(case), "torch's attention is invariant here: this shows nothing"
    whole = ours(case)[0]
    for sequence, last in ((0, 64), (0, 256), (0, 320), (1, 64)):
        row = last - 1 + 320 * sequence
        assert torch.equal(ours(case.part(sequence, last - 1, last))[0][0], whole[row])
        assert whole[row].count_nonzero() > whole[row].numel() // 4


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_query_in_any_batch_of_any_shape(data):
    """A query has the same result decoded alone, in a chunk, and in its sequence among others."""
    group, key_heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(1, 290), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from(DTYPES))
    size = 2 * data.draw(st.integers(1, 40))
    case = cancelling_case(lengths, heads=group * key_heads, key_heads=key_heads, size=size, dtype=dtype)
    sequence = data.draw(st.integers(0, len(lengths) - 1))
    last = data.draw(st.integers(1, lengths[sequence]))
    first = data.draw(st.integers(0, last - 1))
    row = sum(lengths[:sequence]) + last - 1
    whole = ours(case, "cpu", ("q",))
    for start in (last - 1, first, 0):
        part = ours(case.part(sequence, start, last), "cpu", ("q",))
        assert_same_bits([values[-1] for values in part], [values[row] for values in whole])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sequences_in_any_batch(dtype, cpu):
    check_sequences_in_any_batch(cancelling_case([300, 17, 130], dtype=dtype), cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_layouts(dtype, cpu):
    check_padded_layouts(cancelling_case([30, 1, 270], [40, 1, 270], dtype=dtype), cpu)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(dtype, cpu, threads):
    case = cancelling_case([300, 40, 7], dtype=dtype, heads=6, key_heads=3)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        results.append(ours(case, cpu))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_that_nobody_asked_for(dtype, cpu):
    check_each_choice_of_gradients(random_case([20, 5], dtype=dtype), cpu)


def test_strided_operands_are_read_in_place(cpu):
    """Heads and rows of a split projection are not contiguous; the result equals the result of copies."""
    case = random_case([20, 11], size=16)
    expected = ours(case, cpu)
    both = torch.cat([case.q, case.k, case.v], 1)
    q, k, v = both.split([4, 2, 2], 1)
    case.q, case.k, case.v = q, k, v
    assert not k.is_contiguous()
    assert_same_bits(ours(case, cpu), expected)


def test_gradient_may_be_taken_twice_and_of_an_expanded_sum(backend):
    case = random_case([20, 5])
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    offsets = case.offsets(case.queries)
    out = attention(*leaves, cu_seqlens_q=offsets, cu_seqlens_k=offsets, backend=backend)
    first, second = (torch.autograd.grad(out.sum(), leaves, retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)
    assert_same_bits(torch.autograd.grad(out, leaves, torch.ones_like(out)), first)


def test_under_autocast(backend):
    case = random_case([20, 5])
    offsets = case.offsets(case.queries)
    options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "backend": backend}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(case.q, case.k, case.v.half(), **options)
    assert torch.equal(out, attention(case.q.bfloat16(), case.k.bfloat16(), case.v.half().bfloat16(), **options))


Q, K, V = torch.zeros(5, 4, 8), torch.zeros(6, 2, 8), torch.zeros(6, 2, 3)
CU_Q, CU_K = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("bad", "error", "named", "was", "must_be"),
    [
        ({"q": Q.double()}, TypeError, "q", "torch.float64", "float32, bfloat16"),
        ({"q": Q[0]}, ValueError, "q", r"\(4, 8\)", r"\[T, heads, size\]"),
        ({"q": Q.tolist()}, TypeError, "q", "list", "a tensor"),
        ({"q": torch.zeros(5, 8, 4).mT}, ValueError, "q", r"\(4, 1, 32, 4\)", "contiguous"),
        ({"q": torch.zeros(5, 4, 257)}, ValueError, "q", r"257\)", "1 to 256"),
        ({"q": Q[:, :3]}, ValueError, "k", "2 heads", "multiple"),
        ({"q": Q[..., :7]}, ValueError, "k", r"\(1, 2, 6, 8\)", "1 and 7"),
        ({"k": K.bfloat16()}, TypeError, "k", "bfloat16", "the dtype of q, .*float32"),
        ({"k": K[:, :0]}, ValueError, "k", r"\(1, 0, 6, 8\)", "heads"),
        ({"k": K.to(META)}, ValueError, "k", "meta", "cpu"),
        ({"v": V[:5]}, ValueError, "v", r"\(1, 2, 5, 3\)", "2 and 6"),
        ({"v": V[:, :1]}, ValueError, "v", r"\(1, 1, 6, 3\)", "2 and 6"),
        ({"cu_seqlens_q": CU_Q.float()}, ValueError, "cu_seqlens_q", "float32", r"int32 \[B \+ 1\]"),
        ({"cu_seqlens_q": CU_Q[:2]}, ValueError, "cu_seqlens_k", r"\(3,\)", r"the shape of cu_seqlens_q, \(2,\)"),
        ({"cu_seqlens_q": CU_K}, ValueError, "cu_seqlens_q", r"\[0, 4, 6\]", "end at the number of rows, 5"),
        ({"cu_seqlens_k": CU_K.flip(0)}, ValueError, "cu_seqlens_k", r"\[6, 4, 0\]", "start at 0"),
        ({"cu_seqlens_k": CU_K.tolist()}, TypeError, "cu_seqlens_k", "list", "a tensor"),
        ({"scale": 0.0}, ValueError, "scale", "0.0", "above 0"),
        ({"scale": "1"}, TypeError, "scale", "'1'", "a number"),
    ],
)
def test_bad_input(bad, error, named, was, must_be, backend):
    good = {"q": Q, "k": K, "v": V, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "backend": backend}
    attention(**good)
    with pytest.raises(error, match=rf"^{named}\b.*{was}.*must .*{must_be}"):
        attention(**{**good, **bad})


@pytest.mark.parametrize(
    "span", [[0, 0, 6, 0, 6], [0, 3, 3, 0, 6], [1, 0, 1, 0, 1], [0, -1, 2, 0, 2], [0, 0, 5, 3, 2**62], [0, 0, -1, 0, 1]]
)
def test_spans_outside_of_the_operands_are_refused_not_read(span, cpu):
    q, k, v = (x.transpose(0, 1)[None] for x in (Q, K, V))
    with pytest.raises(ValueError, match=r"^spans has queries or keys at row 1 .* must be within"):
        attention_over_spans(q, k, v, torch.tensor([[0, 0, 5, 0, 6], span]), backend=cpu)


def test_rows_far_apart(cpu):
    """Rows lie beyond 2^31 elements. The memory pages between them are never touched."""
    case = random_case([2], heads=2, key_heads=1, size=8, dtype=torch.bfloat16)
    stride = 2**31 + 64
    expected = ours(case, cpu)[0]
    for name in ("q", "k", "v"):
        x = getattr(case, name)
        far = torch.empty(stride + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (stride, *x.stride()[1:]))
        far.copy_(x)
        moved = random_case([2], heads=2, key_heads=1, size=8, dtype=torch.bfloat16)
        setattr(moved, name, far)
        offsets = moved.offsets([2])
        out = attention(moved.q, moved.k, moved.v, cu_seqlens_q=offsets, cu_seqlens_k=offsets, backend=cpu)
        assert torch.equal(out, expected)


def test_zeros_where_memory_was_used(cpu):
    """Rows without a query are 0 in reused memory too.

    The tensors are so large that their pages are returned to the system instead of written.
    """
    q, k, v = (normal(1, 2, 40_000, 16, seed=seed).requires_grad_() for seed in (1, 2, 3))
    used = [torch.full((1, 40_000, 2, 16), torch.nan) for _ in range(4)]
    del used
    spans = torch.tensor([[0, 39_990, 10, 39_990, 10]])
    out = attention_over_spans(q, k, v, spans, backend=cpu)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for values in (out.transpose(1, 2), *grads):
        assert not values[:, :, :39_990].any()
        assert values[:, :, 39_990:].isfinite().all()
