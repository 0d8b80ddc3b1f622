"""The Triton kernels of attention on a GPU: the interpreter's checks, and checks that need hardware."""

from dataclasses import replace

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
    ours,
    random_case,
)
from cuda_graphs import captured
from dtypes import DTYPES
from gpu_waits import count_waits
from policy_batches import assert_same_bits

from minirl_kernels import attention, batch_invariant_mode
from minirl_kernels.ops.attention import attention_over_spans

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_a_sum_over_values_in_any_batch(size, dtype):
    """A block of keys that all rows see has no mask, and it has one where another row of the block sees less."""
    case = cancelling_values(random_case([320, 64], dtype=dtype, size=size, heads=8, key_heads=2, device=DEVICE))
    case.v = case.v.to(DEVICE)
    whole = ours(case, "triton", ("q",))
    for last in (2, 63, 64, 65, 255, 256, 320):
        part = ours(case.part(0, last - 1, last), "triton", ("q",))
        assert_same_bits([values[0] for values in part], [values[last - 1] for values in whole])


def off_by_one(x):
    """The same values, at an address that is no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def with_a_gap(x):
    """The same values, in rows that begin at odd elements."""
    return torch.cat([x, x.new_zeros(*x.shape[:-1], 1)], -1)[..., :-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 64, 80, 126, 128, 130, 256])
def test_every_layout_of_memory(size, dtype):
    case = cancelling_case([130, 40], dtype=dtype, size=size, device=DEVICE)
    expected = ours(case, "triton")
    for layout in (off_by_one, with_a_gap):
        for names in (("q",), ("k",), ("v",), ("upstream",), ("q", "k", "v", "upstream")):
            moved = replace(case, **{name: layout(getattr(case, name)) for name in names})
            assert_same_bits(ours(moved, "triton"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_of_both_widths_and_spans(dtype):
    """Offsets and spans are read by other binaries, which must add in the same order."""
    case = cancelling_case([130, 40, 1], dtype=dtype, device=DEVICE)
    offsets, expected = case.offsets(case.queries), ours(case, "triton")[0]
    wide = offsets.long()
    assert torch.equal(
        attention(case.q, case.k, case.v, cu_seqlens_q=wide, cu_seqlens_k=wide, scale=case.scale), expected
    )
    spans = torch.stack([torch.zeros_like(wide[1:]), wide[:-1], wide.diff(), wide[:-1], wide.diff()], 1)
    by_head = [x.transpose(0, 1)[None] for x in (case.q, case.k, case.v)]
    assert torch.equal(attention_over_spans(*by_head, spans, scale=case.scale)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cuda_graph_reads_the_offsets_of_each_replay(dtype):
    """Forward and backward. The host waits for nothing, and no offset of an earlier call is kept."""
    case = random_case([50, 14], dtype=dtype, device=DEVICE)
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    offsets = case.offsets(case.queries)

    def run():
        out = attention(*leaves, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
        return (out, *torch.autograd.grad(out, leaves, case.upstream))

    assert count_waits(run) == 0
    graph, results = captured(run)
    for lengths in ([50, 14], [1, 63], [64, 0]):
        offsets.copy_(case.offsets(lengths))
        graph.replay()
        assert_same_bits([x.detach() for x in results], [x.detach() for x in run()])


def test_a_cuda_graph_of_a_decode_step():
    """A model of transformers in the mode, with a static cache and a padding mask."""
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen3Config(
        **settings, num_key_value_heads=2, head_dim=16, vocab_size=64, attn_implementation="minirl"
    )
    model = transformers.Qwen3ForCausalLM(config).to(DEVICE).eval()
    prompts = torch.randint(64, (3, 9), device=DEVICE)
    mask = torch.ones(3, 10, dtype=torch.long, device=DEVICE)
    mask[0, :4] = 0
    with torch.no_grad(), batch_invariant_mode():

        def prefilled():
            cache = transformers.StaticCache(config, max_cache_len=16)
            model(prompts, attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
            return cache

        positions = (mask.cumsum(1) - 1).clamp(min=0)
        token = torch.randint(64, (3, 1), device=DEVICE)

        def step(cache):
            return model(token, attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache).logits

        expected = step(prefilled())
        cache = prefilled()
        step(prefilled())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(cache)
        graph.replay()
    assert torch.equal(logits, expected)
