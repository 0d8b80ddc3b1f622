"""Packed experts give the bits of the weights, and an unsuitable use raises."""

import pytest
import torch
from dtypes import DTYPES

from minirl_kernels import moe_experts, pack_experts
from minirl_kernels.backends import native

pytestmark = pytest.mark.usefixtures("cpu")
# (T, K, E, H, I): around panels (8, 16, 32 columns), blocks (252 rows; 256 and 512 columns) and chunks (256, 512)
SIZES = [
    (1, 2, 3, 8, 4),
    (23, 4, 4, 33, 31),
    (300, 1, 1, 20, 301),
    (40, 3, 9, 530, 17),
    (270, 2, 2, 1030, 40),
    (0, 1, 2, 8, 8),
]


def random_case(tokens, top_k, num_experts, hidden_size, width, dtype):
    gen = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    experts = torch.rand(tokens, num_experts, generator=gen).argsort(-1)[:, :top_k]
    weights = torch.softmax(normal(tokens, top_k), -1)
    gate_up, down = normal(num_experts, 2 * width, hidden_size), normal(num_experts, hidden_size, width)
    return normal(tokens, hidden_size).to(dtype), (weights, experts), gate_up.to(dtype), down.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_same_bits(size, dtype, threads):
    hidden, routing, *weights = random_case(*size, dtype)
    expected = moe_experts(hidden, routing, *weights)
    for count in (1, 2):
        threads(count)
        assert torch.equal(moe_experts(hidden, routing, *pack_experts(*weights)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_same_bits_on_every_instruction_set(isa, dtype, set_isa):
    if isa not in native().isa_supported():
        pytest.skip(f"this processor does not run {isa}")
    set_isa(isa)
    hidden, routing, *weights = random_case(150, 2, 3, 1030, 290, dtype)
    assert torch.equal(moe_experts(hidden, routing, *pack_experts(*weights)), moe_experts(hidden, routing, *weights))


def test_slices_of_wider_buffers():
    dtype = torch.bfloat16
    hidden, routing, gate_up, down = random_case(40, 2, 4, 33, 20, dtype)
    wide_gate_up, wide_down = (
        torch.full((5, 43, 40), torch.nan, dtype=dtype),
        torch.full((33, 4, 29), torch.nan, dtype=dtype),
    )
    wide_gate_up[1:, 3:, 2:35], wide_down[:, :, 9:] = gate_up, down.transpose(0, 1)
    packed = pack_experts(wide_gate_up[1:, 3:, 2:35], wide_down[:, :, 9:].transpose(0, 1))
    assert torch.equal(moe_experts(hidden, routing, *packed), moe_experts(hidden, routing, gate_up, down))


def test_copies_do_not_follow_their_weights():
    hidden, routing, gate_up, down = random_case(9, 2, 4, 33, 20, torch.float32)
    expected = moe_experts(hidden, routing, gate_up, down)
    packed = pack_experts(gate_up, down)
    gate_up.zero_()
    assert torch.equal(moe_experts(hidden, routing, *packed), expected)


def test_what_packed_experts_are_not_for(set_isa):
    hidden, routing, gate_up, down = random_case(9, 2, 4, 33, 20, torch.float32)
    packed = pack_experts(gate_up, down)
    with pytest.raises(TypeError, match=r"^down_proj is a Tensor: it must be packed"):
        moe_experts(hidden, routing, packed[0], down)
    with pytest.raises(TypeError, match=r"^gate_up_proj was packed from torch\.float32: .* torch\.bfloat16"):
        moe_experts(hidden.bfloat16(), routing, *packed)
    with pytest.raises(ValueError, match=r"^gate_up_proj has shape \(4, 40, 33\): it must be \[E, 2 I, 32\]"):
        moe_experts(hidden[:, :32], routing, *packed)
    with pytest.raises(ValueError, match=r"^down_proj has shape \(4, 33, 19\)"):
        pack_experts(gate_up, down[:, :, :19])
    with pytest.raises(ValueError, match=r"^routing\.experts has the expert 7 at row 3"):
        moe_experts(hidden, (routing[0], routing[1].index_fill(0, torch.tensor([3]), 7)), *packed)
    leaf = hidden.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^gate_up_proj is packed: .* gradient"):
        moe_experts(leaf, routing, *packed)
    with torch.no_grad():
        assert torch.equal(moe_experts(leaf, routing, *packed), moe_experts(hidden, routing, gate_up, down))
    set_isa("baseline")
    with pytest.raises(ValueError, match=r"^gate_up_proj was packed for .*: it must be for baseline"):
        moe_experts(hidden, routing, *packed)
