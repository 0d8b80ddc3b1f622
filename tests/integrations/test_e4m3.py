"""The fake-quantised copy: the rounded weights, the rounded values, and a source model that does not change."""

import copy

import pytest
import torch
from tiny_moe import tiny, token_ids

from minirl_kernels.integrations.transformers.e4m3 import E4M3Copy, round_to_e4m3

E4M3_VALUES = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
E4M3_VALUES = E4M3_VALUES[~E4M3_VALUES.isnan()]


def nearest(values, dim):
    """The nearest e4m3 numbers, found by comparing with all numbers of e4m3 in float64."""
    scale = values.abs().amax(dim, keepdim=True) / 448
    distance = (values / scale)[..., None] - E4M3_VALUES
    return E4M3_VALUES[distance.abs().argmin(-1)] * scale


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", [(5, 33), (3, 8, 17)])
def test_rounds_to_the_nearest(shape, dim):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    rounded = round_to_e4m3(values, dim)
    torch.testing.assert_close(rounded.double(), nearest(values.double(), dim), rtol=1e-6, atol=0)
    assert not torch.equal(rounded, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_zeros_and_what_is_not_finite(dtype):
    values = torch.tensor([[0.0, 0.0], [1.0, -2.0], [float("inf"), 1.0], [float("nan"), 1.0]], dtype=dtype)
    rounded = round_to_e4m3(values, -1)
    assert rounded.dtype == dtype
    assert torch.equal(rounded[:2], values[:2])
    assert rounded[2:].isnan().any(1).all()
    assert round_to_e4m3(values[:0], -1).shape == (0, 2)


def test_a_token_is_rounded_whatever_stands_beside_it():
    values = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    values[3] *= 1e4
    assert torch.equal(round_to_e4m3(values, -1), torch.cat([round_to_e4m3(row[None], -1) for row in values]))


@pytest.mark.parametrize("name", ["Qwen3Moe", "DeepseekV3", "GptOss"])
def test_what_is_rounded(name):
    model = tiny(name).eval()
    before = copy.deepcopy(model.state_dict())
    twin = E4M3Copy(model).model
    changed = {name for name, weight in twin.named_parameters() if not torch.equal(weight, model.get_parameter(name))}
    expected = {
        name
        for name, weight in model.named_parameters()
        if weight.dim() > 1
        and not any(part in name for part in ("embed_tokens", "lm_head", "gate.", "router.", "bias"))
    }
    assert changed == expected
    assert any("experts" in name for name in expected)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        is_shared = twin.get_parameter(name) is weight
        assert is_shared == (name not in changed)
        if name in changed:
            transposed = getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
            dim = -2 if transposed else -1
            assert torch.equal(twin.get_parameter(name), round_to_e4m3(weight, dim))


def test_tied_embeddings_stay():
    model = tiny("Qwen3Moe", tie_word_embeddings=True).eval()
    twin = E4M3Copy(model).model
    assert twin.lm_head.weight is model.model.embed_tokens.weight


def test_inputs_are_rounded_token_by_token():
    model = tiny("Qwen3Moe").eval()
    twin = E4M3Copy(model).model
    given = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts", "model.layers.1.mlp.gate", "lm_head"):
        twin.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: given.update({name: args[0]})
        )
    with torch.no_grad():
        twin(token_ids())
    for name, hidden in given.items():
        is_rounded = torch.equal(hidden, round_to_e4m3(hidden, -1))
        assert is_rounded == (name not in ("model.layers.1.mlp.gate", "lm_head"))


def test_refresh_follows_the_source():
    model = tiny("Qwen3Moe").eval()
    quantized = E4M3Copy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    name = "model.layers.0.self_attn.q_proj.weight"
    old = quantized.model.get_parameter(name).clone()
    quantized.refresh()
    assert torch.equal(quantized.model.get_parameter(name), round_to_e4m3(model.get_parameter(name), -1))
    assert not torch.equal(quantized.model.get_parameter(name), old)
    fresh = E4M3Copy(model).model
    with torch.no_grad():
        assert torch.equal(quantized.model(token_ids()).logits, fresh(token_ids()).logits)


def test_the_model_computes_and_learns_as_before():
    model, ids = tiny("Qwen3Moe").eval(), token_ids()
    expected = model(ids).logits
    twin = E4M3Copy(model).model
    assert torch.equal(model(ids).logits, expected)
    assert all(weight.requires_grad for weight in model.parameters())
    difference = (twin(ids).logits - expected).norm() / expected.norm()
    assert 1e-3 < difference < 0.5


def test_a_model_without_matmuls_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match=r"a GPT2LMHeadModel has no nn\.Linear and no experts"):
        E4M3Copy(model)
