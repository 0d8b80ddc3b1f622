"""check_batch_invariant accepts invariant models, and names the module of a model that is not invariant."""

import copy

import pytest
import torch
from tiny_families import exists, tiny_family

from minirl_kernels import batch_invariant_mode
from minirl_kernels.batch_invariant import audit
from minirl_kernels.integrations.transformers import check_batch_invariant, enable_log_probs

pytestmark = pytest.mark.usefixtures("cpu")


def ours(family, **changes):
    model = tiny_family(family, **changes)
    model.set_attn_implementation("minirl")
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        model.set_experts_implementation("minirl")
    return model


# some have a window that no layer uses; transformers still makes its mask
FINE = """
    cohere2 deepseek_v2 deepseek_v3 gemma gemma3_text glm4 gpt2 gpt_neox granite llama mistral mixtral olmo2 olmo3 olmoe
    opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm starcoder2
"""


@pytest.mark.parametrize("family", FINE.split())
def test_a_model_that_asks_for_our_attention_everywhere_passes(family):
    if not exists(family):
        pytest.skip("this transformers has no such family")
    check_batch_invariant(ours(family))


# {family: the named module, and the reason}
REFUSED = {
    "qwen3_next": r"layers\.0\.linear_attn \(Qwen3NextGatedDeltaNet\) runs aten::convolution",
    "qwen3_5_text": r"layers\.0\.linear_attn \(Qwen3_5GatedDeltaNet\) runs aten::convolution",
    "mamba2": r"layers\.0\.mixer \(Mamba2Mixer\) runs aten::convolution",
    "falcon_h1": r"layers\.0\.mamba \(FalconH1Mixer\) runs aten::convolution",
    "lfm2": r"layers\.0\.conv \(Lfm2ShortConv\) runs aten::convolution",
    "recurrent_gemma": r"temporal_block\.conv_1d \(Conv1d\) runs aten::convolution",
    "minimax": r"layers\.0\.self_attn \(MiniMaxLightningAttention\) (gives different bits|sums over tokens)",
    "bloom": r"h\.0\.self_attention \(BloomAttention\) sums over tokens itself",
    "falcon": r"h\.0\.self_attention \(FalconAttention\) runs aten::_safe_softmax",
    "mpt": r"blocks\.0\.attn \(MptAttention\) sums over tokens itself",
    "gptj": r"h\.0\.attn \(GPTJAttention\) sums over tokens itself",
    "codegen": r"h\.0\.attn \(CodeGenAttention\) sums over tokens itself",
    "gpt_neo": r"attention \(GPTNeoSelfAttention\) sums over tokens itself",
    "xglm": r"self_attn \(XGLMAttention\) sums over tokens itself",
    "deepseek_v32": r"self_attn\.indexer \(DeepseekV32Indexer\) cannot compute",
    "gpt_oss": r"GptOssAttention asks for attention sinks",
}


@pytest.mark.parametrize("family", REFUSED)
def test_any_other_is_refused_by_the_name_of_the_module(family):
    if not exists(family):
        pytest.skip("this transformers has no such family")
    with pytest.raises(ValueError, match=REFUSED[family]):
        check_batch_invariant(ours(family))


def test_another_implementation_is_refused():
    with pytest.raises(ValueError, match=r"self_attn \(Qwen3Attention\) (runs|sums)"):
        check_batch_invariant(tiny_family("qwen3"))


def test_a_window_that_is_used_is_refused_by_its_layer():
    model = ours("gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=8)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn \(Gemma3Attention\) .*\(a window"):
        check_batch_invariant(model)


def test_a_model_that_differs_by_its_bits_alone_is_refused():
    """All operations are covered and none sums over tokens, but the result depends on the size of the batch."""
    model = ours("qwen3")
    norm = model.model.layers[1].mlp
    norm.register_forward_hook(lambda module, args, out: out * (1 + 1e-6 * len(out)))
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp \(Qwen3MLP\) gives different bits in a padded batch and alone"
    ):
        check_batch_invariant(model)


def hooks(model):
    return [(*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in model.modules()]


def test_it_leaves_the_model_as_it_was():
    model = enable_log_probs(ours("qwen3_moe"))
    before, hooks_before = copy.deepcopy(model.state_dict()), hooks(model)
    check_batch_invariant(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks(model) == hooks_before


def test_weights_must_be_there():
    with torch.device("meta"):
        model = tiny_family("qwen3")
    with pytest.raises(ValueError, match="on the meta device: the check must come after loading them"):
        check_batch_invariant(model)


def test_an_audit_does_not_call_a_model_covered():
    model = ours("minimax")
    with batch_invariant_mode(), audit() as found:
        model(torch.arange(9)[None])
    assert "all is covered" not in str(found)
    assert "check_batch_invariant" in str(found) or found.not_covered
