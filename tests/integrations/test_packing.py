"""Packed sequences: a family that mixes sequences is refused with the module's name; other families are accepted."""

import pytest
import torch
from tiny_families import exists, tiny_family

from minirl_kernels.integrations.transformers import enable_log_probs, packing_leak, refuse_packed

POSITIONS = torch.cat([torch.arange(6), torch.arange(7)])[None]
APART = """
    apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 gemma gemma2 gemma3_text glm glm4
    glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe helium jetmoe llama mistral mixtral nanochat nemotron olmo
    olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2
"""
# {family: the named module}
LEAKS = {
    "bamba": "mamba (BambaMixer)",
    "bloom": "self_attention (BloomAttention)",
    "falcon": "self_attention (FalconAttention)",
    "falcon_h1": "mamba (FalconH1Mixer)",
    "falcon_mamba": "mixer (FalconMambaMixer)",
    "gpt_oss": "self_attn (GptOssAttention)",
    "granitemoehybrid": "mamba (GraniteMoeHybridMambaLayer)",
    "jamba": "mamba (JambaMambaMixer)",
    "lfm2": "conv (Lfm2ShortConv)",
    "lfm2_moe": "conv (Lfm2MoeShortConv)",
    "mamba": "mixer (MambaMixer)",
    "mamba2": "mixer (Mamba2Mixer)",
    "minimax": "self_attn (MiniMaxLightningAttention)",
    "mpt": "attn (MptAttention)",
    "opt": "self_attn (OPTAttention)",
    "qwen3_5_text": "linear_attn (Qwen3_5GatedDeltaNet)",
    "qwen3_next": "linear_attn (Qwen3NextGatedDeltaNet)",
    "recurrent_gemma": "temporal_block (RecurrentGemmaRecurrentBlock)",
    "rwkv": "time_shift (ZeroPad2d)",
    "xglm": "self_attn (XGLMAttention)",
}


@torch.no_grad()
def change(model):
    """Relative change of the second sequence's logits if the first sequence has other tokens."""
    generator = torch.Generator().manual_seed(0)
    second = torch.randint(3, 60, (1, 7), generator=generator)
    firsts = [torch.randint(3, 60, (1, 6), generator=generator) for _ in range(2)]
    one, other = (
        model(torch.cat([first, second], 1), position_ids=POSITIONS, use_cache=False).logits[0, 6:] for first in firsts
    )
    return ((one - other).abs().max() / one.abs().max()).item()


@pytest.mark.parametrize("family", [*APART.split(), *LEAKS])
def test_a_family_is_refused_exactly_where_the_next_sequence_changes(family):
    if not exists(family):
        pytest.skip("this transformers has no such family")
    model = tiny_family(family)
    leak = packing_leak(model)
    assert (leak is not None) == (change(model) > 1e-5)
    if leak is None:
        refuse_packed(model, POSITIONS)
    else:
        assert family in LEAKS
        assert leak.endswith(f".{LEAKS[family]}")
        with pytest.raises(ValueError, match="it must be one sequence per row, padded") as refusal:
            refuse_packed(model, POSITIONS)
        assert leak in str(refusal.value)


def test_only_packed_input_is_refused():
    model = tiny_family("qwen3_next")
    refuse_packed(model, None)
    refuse_packed(model, torch.arange(9).expand(2, 9))
    with pytest.raises(ValueError, match=r"linear_attn \(Qwen3NextGatedDeltaNet\) lets a sequence change"):
        refuse_packed(model, None, torch.tensor([0, 6, 13], dtype=torch.int32))


def test_the_model_is_asked_once_for_each_attention(cpu):
    model, calls = tiny_family("qwen3"), []
    model.register_forward_hook(lambda *_: calls.append(model.config._attn_implementation))
    for implementation in ("sdpa", "sdpa", "minirl", "minirl"):
        model.set_attn_implementation(implementation)
        refuse_packed(model, POSITIONS)
    assert calls == ["sdpa", "minirl"]
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_inside_a_compiled_function():
    leaky, apart = tiny_family("qwen3_next"), tiny_family("qwen3")
    packing_leak(leaky), packing_leak(apart)

    @torch.compile(fullgraph=True, backend="eager")
    def checked(model, positions):
        refuse_packed(model, positions)
        return positions + 1

    checked(apart, POSITIONS)
    checked(leaky, torch.arange(13)[None])
    with pytest.raises(ValueError, match=r"lets a sequence change the next one"):
        checked(leaky, POSITIONS)


def test_our_attention_refuses_packed_sequences_of_a_hybrid_model(cpu):
    """Also without enable_log_probs, by the layer kinds in the model's config."""
    model = tiny_family("qwen3_next")
    model.set_attn_implementation("minirl")
    ids = torch.arange(13)[None]
    model(ids, use_cache=False)
    with pytest.raises(
        ValueError, match="Qwen3NextConfig has layers of the kind linear_attention, which lets a sequence"
    ):
        model(ids, position_ids=POSITIONS, use_cache=False)


def test_weights_must_be_there():
    with torch.device("meta"):
        model = tiny_family("qwen3")
    with pytest.raises(ValueError, match="on the meta device"):
        packing_leak(model)


@pytest.mark.parametrize("compiles", [False, True])
def test_scored_sequences_must_not_be_packed_where_they_mix(compiles):
    leaky, apart = enable_log_probs(tiny_family("qwen3_next")), enable_log_probs(tiny_family("qwen3"))
    ids = torch.arange(3, 16)[None]

    def score(model, **inputs):
        call = torch.compile(model, backend="aot_eager") if compiles else model
        with torch.no_grad():
            return call(ids, token_ids=ids, use_cache=False, **inputs).log_probs

    for inputs in ({"position_ids": POSITIONS}, {"cu_seq_lens_q": torch.tensor([0, 6, 13], dtype=torch.int32)}):
        with pytest.raises(ValueError, match=r"linear_attn \(Qwen3NextGatedDeltaNet\) lets a sequence change"):
            score(leaky, **inputs)
    assert torch.equal(score(leaky, position_ids=torch.arange(13)[None]), score(leaky))
    alone = apart(ids[:, 6:], token_ids=ids[:, 6:]).log_probs
    torch.testing.assert_close(score(apart, position_ids=POSITIONS)[:, 6:], alone, rtol=1e-5, atol=1e-6)
