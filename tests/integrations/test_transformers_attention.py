"""attn_implementation="minirl": models against eager attention, and the same bits of a token in every layout."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from linear_head import assert_matrices_as_exact
from tiny_moe import COMMON, CONFIGS
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import minirl_kernels.integrations.transformers
from minirl_kernels.integrations.transformers.attention import _check, attention_forward, attention_mask
from minirl_kernels.ops.attention.op import OP

pytestmark = pytest.mark.usefixtures("cpu")

DTYPES = [torch.float32, torch.bfloat16]
MODELS = {
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": CONFIGS["Qwen3Moe"],
    "Llama": {},
    "Mixtral": CONFIGS["Mixtral"],
    "DeepseekV3": CONFIGS["DeepseekV3"],  # its values are narrower than its keys
}
LENGTHS = [9, 4, 1, 7]
HEADS, KEY_HEADS, SIZE = 4, 2, 16


@functools.cache
def _model(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**COMMON, **MODELS[name]})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():  # with the initial weights, attention would be nearly uniform
            if weight.dim() > 1:
                weight.mul_(4)
    return model


def model_of(name, implementation="minirl", dtype=torch.float32):
    model = copy.deepcopy(_model(name)).to(dtype).train()
    model.set_attn_implementation(implementation)
    model.set_experts_implementation("eager")  # other implementations do not support float64
    return model


def padded_batch(side, lengths=LENGTHS):
    """(input_ids, attention_mask, position_ids)."""
    width = max(lengths)
    ids = torch.randint(1, 64, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    column = torch.arange(width)
    mask = torch.stack([column >= width - length if side == "left" else column < length for length in lengths])
    return ids, mask.long(), (mask.long().cumsum(1) - 1).clamp(min=0)


def gradients(model, ids, mask, positions, upstream):
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    chosen = logits[mask.bool()]
    return chosen.detach(), *torch.autograd.grad(chosen, list(model.parameters()), upstream.to(chosen.dtype))


def gradients_of_each_alone(model, ids, mask, positions, upstream):
    """The same gradients, from each sequence alone and without padding."""
    logits = [
        model(input_ids=row[seen.bool()][None], use_cache=False).logits[0] for row, seen in zip(ids, mask, strict=True)
    ]
    chosen = torch.cat(logits)
    return chosen.detach(), *torch.autograd.grad(chosen, list(model.parameters()), upstream.to(chosen.dtype))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    # in bfloat16, a router near a tie may choose another expert with either attention
    [*((name, torch.float32) for name in MODELS), ("Qwen3", torch.bfloat16), ("Llama", torch.bfloat16)],
)
def test_as_eager_attention_computes_it(name, dtype, side):
    """Compares logits and all gradients together, since the rounding error of a single tensor is random."""
    lengths = [60, 50, 40, 64]
    batch = padded_batch(side, lengths)
    upstream = torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(1))
    results = gradients(model_of(name, dtype=dtype), *batch, upstream)
    eager = gradients_of_each_alone(model_of(name, "eager", dtype), *batch, upstream)
    exact = gradients_of_each_alone(model_of(name, "eager", dtype).double(), *batch, upstream)

    def relative(values):
        """Each tensor divided by its norm."""
        sizes = [truth.norm().where(truth.any(), 1.0) for truth in exact]
        return torch.cat([(x.double() / size).flatten() for x, size in zip(values, sizes, strict=True)]).to(dtype)

    assert_matrices_as_exact(relative(results), relative(eager), relative(exact).double())


@pytest.mark.parametrize("name", ["Qwen3", "Mixtral"])
def test_gradient_checkpointing(name):
    batch = padded_batch("left")
    upstream = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(1))
    expected = gradients(model_of(name), *batch, upstream)
    for reentrant in (False, True):
        model = model_of(name)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            ids, mask, positions = batch
            model.enable_input_require_grads()
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            logits[mask.bool()].backward(upstream)
            results = [weight.grad for weight in model.parameters()]
        else:
            results = gradients(model, *batch, upstream)[1:]
        assert all(map(torch.equal, results, expected[1:]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Qwen3Moe"])
def test_generate(name, cache):
    """Greedy decoding gives the tokens of eager attention, and in a padded batch the tokens of each prompt alone."""
    ids, mask, _ = padded_batch("left")
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    options["disable_compile"] = True
    model = model_of(name).eval()
    tokens = model.generate(ids, attention_mask=mask, **options)
    theirs = model_of(name, "eager").eval().generate(ids, attention_mask=mask, **options)
    assert torch.equal(tokens, theirs)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], **options)
        assert torch.equal(alone[0], tokens[row, -length - 8 :])


class Attention(torch.nn.Module):
    """A module with the attributes that the attention function reads."""

    is_causal = True


def config():
    return transformers.Qwen3Config(**COMMON, head_dim=8, attn_implementation="minirl")


def sequences(dtype):
    """(q, k, v) [L, heads, SIZE] for each of LENGTHS, with values for which another order of summation changes bits."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(SIZE, generator=generator)

    def twice(length, heads, sign):
        half = torch.randn(length, heads, SIZE // 2, generator=generator).to(dtype)
        return torch.cat([half, sign * half], -1)[..., order]

    return [(twice(n, HEADS, 1), twice(n, KEY_HEADS, -1), torch.randn(n, KEY_HEADS, SIZE).to(dtype)) for n in LENGTHS]


def attend(q, k, v, mask, **kwargs):
    """[B, L, heads, SIZE] each, in the layout of a model."""
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    return attention_forward(Attention(), *by_head, mask, scaling=2.0**17, **kwargs)[0]


def mask_for(batch, length, mask=None, cache=None, positions=None):
    embeddings = torch.empty(batch, length, 32)
    return create_causal_mask(config(), embeddings, mask, cache, position_ids=positions)


@pytest.fixture(params=DTYPES, ids=str)
def case(request):
    torch.manual_seed(0)
    items = sequences(request.param)
    alone = [attend(*(x[None] for x in item), mask_for(1, len(item[0])))[0] for item in items]
    assert all(out.isfinite().all() for out in alone)
    return SimpleNamespace(items=items, alone=alone)


def pad(items, side, width, value=torch.nan):
    out = items[0].new_full((len(items), width, *items[0].shape[1:]), value)
    mask = torch.zeros(len(items), width, dtype=torch.long)
    for row, x in enumerate(items):
        place = slice(width - len(x), width) if side == "left" else slice(0, len(x))
        out[row, place], mask[row, place] = x, 1
    return out, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(case, side):
    """The contents of padding are ignored, and a padding query gives 0."""
    (q, mask), (k, _), (v, _) = (pad([item[i] for item in case.items], side, 12) for i in range(3))
    out = attend(q, k, v, mask_for(len(q), 12, mask))
    assert torch.equal(out[mask.bool()], torch.cat(case.alone))
    assert not out[~mask.bool()].any()


def test_packed_sequences(case):
    """Sequences packed by position_ids, or by the offsets of flash attention."""
    q, k, v = (torch.cat([item[i] for item in case.items])[None] for i in range(3))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    expected = torch.cat(case.alone)
    assert torch.equal(attend(q, k, v, mask_for(1, sum(LENGTHS), positions=positions))[0], expected)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    assert torch.equal(attend(q, k, v, None, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)[0], expected)


def test_packed_rows_of_a_batch(case):
    """Two rows, each with different packed sequences."""
    pairs = [(case.items[0], case.items[1]), (case.items[2], case.items[3], case.items[1])]
    rows = [[torch.cat([item[i] for item in pair]) for i in range(3)] for pair in pairs]
    length = min(len(row[0]) for row in rows)
    positions = torch.stack([torch.cat([torch.arange(len(item[0])) for item in pair])[:length] for pair in pairs])
    q, k, v = (torch.stack([row[i][:length] for row in rows]) for i in range(3))
    out = attend(q, k, v, mask_for(2, length, positions=positions))
    alone = [torch.cat([case.alone[n] for n in numbers])[:length] for numbers in ((0, 1), (2, 3, 1))]
    assert torch.equal(out, torch.stack(alone))


class Cached:
    """Keys and values in a cache of transformers, with the mask of the next tokens."""

    def __init__(self, kind, width):
        self.cache = DynamicCache(config=config()) if kind == "dynamic" else StaticCache(config(), max_cache_len=width)

    def step(self, q, k, v, mask):
        seen = None if mask is None else mask
        made = mask_for(q.shape[0], q.shape[1], seen, self.cache)
        # every layer gets the same mask
        for layer in range(COMMON["num_hidden_layers"]):
            keys, values = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return attend(q, keys.transpose(1, 2), values.transpose(1, 2), made)


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_then_chunks(case, kind, chunk):
    """A batch padded on the left: a prefill, and then several tokens at a time with a cache."""
    width, prefill = 12, 4
    (q, mask), (k, _), (v, _) = (pad([item[i] for item in case.items], "left", width, value=7.0) for i in range(3))
    cached, outs = Cached(kind, 16), []
    for first, last in [(0, prefill), *((n, n + chunk) for n in range(prefill, width, chunk))]:
        outs.append(cached.step(q[:, first:last], k[:, first:last], v[:, first:last], mask[:, :last]))
    assert torch.equal(torch.cat(outs, 1)[mask.bool()], torch.cat(case.alone))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_without_a_mask(case, kind):
    q, k, v = (x[None] for x in case.items[0])
    cached = Cached(kind, 16)
    outs = [cached.step(*(x[:, n : n + 1] for x in (q, k, v)), None) for n in range(q.shape[1])]
    assert torch.equal(torch.cat(outs, 1)[0], case.alone[0])


def test_a_row_of_padding_alone(case):
    q, k, v = (torch.stack([item, item.clone().fill_(torch.nan)]) for item in case.items[0])
    mask = torch.tensor([[1] * 9, [0] * 9])
    out = attend(q, k, v, mask_for(2, 9, mask))
    assert torch.equal(out[0], case.alone[0])
    assert not out[1].any()


def test_a_window_that_no_sequence_fills(case):
    """A window longer than all sequences is accepted. A shorter one is refused by the layer, not by the mask."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    q, k, v = (torch.cat([item[i] for item in case.items])[None] for i in range(3))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    windowed, embeddings = config(), torch.empty(1, sum(LENGTHS), 32)
    windowed.sliding_window = 9
    mask = create_sliding_window_causal_mask(windowed, embeddings, None, None, position_ids=positions)
    assert torch.equal(attend(q, k, v, mask, sliding_window=9)[0], torch.cat(case.alone))
    with pytest.raises(ValueError, match=r"^attn_implementation is 'minirl': .* a sliding window, of 8, .* of 9$"):
        attend(q, k, v, mask, sliding_window=8)
    windowed.sliding_window = 8
    with pytest.raises(ValueError, match=r"^attn_implementation is 'minirl': .* \(a window, a chunk, an image\)$"):
        attend(q, k, v, create_sliding_window_causal_mask(windowed, embeddings, None, None, position_ids=positions))


def test_compiled_packed_sequences(case):
    """A compiled graph must not depend on the number of packed sequences."""
    torch.compiler.reset()
    q, k, v = (torch.cat([item[i] for item in case.items])[None] for i in range(3))
    settings, embeddings = config(), torch.empty(1, sum(LENGTHS), 32)

    def call(q, k, v, positions):
        return attend(q, k, v, create_causal_mask(settings, embeddings, None, None, position_ids=positions))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    assert torch.equal(compiled(q, k, v, positions)[0], torch.cat(case.alone))
    whole = torch.arange(sum(LENGTHS))[None]
    assert torch.equal(compiled(q, k, v, whole), call(q, k, v, whole))


def test_a_mask_on_a_gpu_does_not_make_the_host_wait():
    """The host cannot read a meta tensor, so a wait would raise. A CUDA graph can capture a decode step."""
    mask, seen = torch.ones(3, 10, dtype=torch.bool, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")
    for padding in (mask, None):
        assert attention_mask(3, 1, 16, q_offset=seen, attention_mask=padding, device="meta").shape == (1, 1, 3, 5)
    assert _check(mask, mask, "reason").shape == mask.shape


@pytest.mark.parametrize("packed", [False, True])
def test_a_layer_is_one_kernel_forward_and_two_backward(packed, monkeypatch):
    """No layer and no direction derives anything from the mask, or from the offsets of packed sequences."""
    pytest.importorskip("triton")
    from kernel_counts import kernels

    monkeypatch.setattr(OP, "resolve", lambda *_: "triton")
    width = 8 if packed else 5
    leaves = [torch.randn(1 if packed else 2, heads, width, SIZE).requires_grad_() for heads in (4, 2, 2)]
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    spans = None if packed else mask_for(2, 5, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    arguments = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets} if packed else {}
    grad_out = torch.randn(leaves[0].transpose(1, 2).shape)

    def layer():
        out, _ = attention_forward(Attention(), *leaves, spans, **arguments)
        torch.autograd.grad(out, leaves, grad_out)

    assert kernels(layer) == ["attention_fwd_kernel", "attention_bwd_q_kernel", "attention_bwd_kv_kernel"]


def test_registered_with_its_masks():
    assert ALL_ATTENTION_FUNCTIONS["minirl"] is attention_forward
    assert "minirl" in ALL_MASK_ATTENTION_FUNCTIONS
    public = ["check_batch_invariant", "disable_log_probs", "enable_log_probs", "packing_leak", "refuse_packed"]
    assert minirl_kernels.integrations.transformers.__all__ == public


QKV = [torch.zeros(1, 3, heads, 8).transpose(1, 2) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dropout": 0.1}, r"dropout, of 0\.1"),
        ({"softcap": 30.0}, "a softcap of the scores"),
        ({"s_aux": torch.zeros(4)}, "attention sinks"),
        ({"position_bias": torch.zeros(1)}, "a bias of the scores"),
        ({"head_mask": torch.ones(4)}, "a mask of heads"),
        ({"output_attentions": True}, r"\(output_attentions\)"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"cache": object()}, "a paged cache"),
    ],
)
def test_what_is_not_computed_is_refused(asked, said):
    attention_forward(Attention(), *QKV, None)
    with pytest.raises(ValueError, match=rf"^attn_implementation is 'minirl': it must be another where .*{said}"):
        attention_forward(Attention(), *QKV, None, **asked)


@pytest.mark.parametrize(
    "mask", [torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 5, dtype=torch.bool)], ids=["float", "bool"]
)
def test_a_mask_of_four_dimensions_is_refused(mask):
    with pytest.raises(ValueError, match=rf"a mask of your own, {mask.dtype} \(1, 1, 3, \d\)"):
        attention_forward(Attention(), *QKV, create_causal_mask(config(), torch.empty(1, 3, 32), mask, None))


def test_masks_that_are_refused():
    embeddings = torch.empty(1, 4, 32)
    with pytest.raises(ValueError, match="padding between the tokens of a row"):
        create_causal_mask(config(), embeddings, torch.tensor([[1, 0, 1, 1]]), None)
    with pytest.raises(ValueError, match="a mask function of its own"):
        create_causal_mask(config(), embeddings, None, None, or_mask_function=lambda b, h, q, k: q == k)
    seen = torch.tensor([[-1, 0, 0, -1]])
    mask = create_causal_mask(config(), embeddings, None, None, block_sequence_ids=seen)
    with pytest.raises(ValueError, match=r"does not see exactly the tokens before it"):
        attention_forward(Attention(), *QKV, mask)
    with pytest.raises(ValueError, match="None with 1 queries and 3 keys"):
        attention_forward(Attention(), QKV[0][:, :, :1], *QKV[1:], None)
    bidirectional = config()
    bidirectional.is_causal = False
    with pytest.raises(ValueError, match=r"does not see exactly the tokens before it"):
        attention_forward(Attention(), *QKV, create_causal_mask(bidirectional, embeddings, None, None))


def test_a_model_that_asks_for_more_says_so():
    """GPT-OSS needs attention sinks and windows shorter than a sequence, so it is refused with these reasons."""
    from tiny_moe import tiny

    model = tiny("GptOss", attn_implementation="minirl")
    with pytest.raises(ValueError, match=r"GptOssAttention asks for attention sinks"):
        model(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(a window, a chunk, an image\)"):
        model(torch.ones(1, 12, dtype=torch.long))
