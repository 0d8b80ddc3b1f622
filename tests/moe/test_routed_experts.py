"""RoutedExperts from the formats of other projects, its layouts, and invalid input."""

import base64
import io

import numpy as np
import pytest
import torch

from minirl_kernels import RoutedExperts


def random_ids(tokens=6, layers=4, top_k=3, num_experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, layers, num_experts, generator=generator).argsort(-1)[..., :top_k]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def raw(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def assert_holds(routed, ids, valid=None):
    valid = torch.ones(ids.shape[:-1], dtype=torch.bool) if valid is None else valid
    assert torch.equal(routed.valid, valid)
    assert torch.equal(routed.experts.long()[valid], ids[valid])


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(8, torch.uint8), (256, torch.uint8), (257, torch.uint16), (65_536, torch.uint16)]
)
@pytest.mark.parametrize(
    "ids_dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64, np.int8, np.int32], ids=str
)
def test_ids_are_kept_compact(ids_dtype, num_experts, dtype):
    ids = random_ids()
    given = ids.numpy().astype(ids_dtype) if isinstance(ids_dtype, type) else ids.to(ids_dtype)
    routed = RoutedExperts.from_ids(given, num_experts=num_experts)
    assert routed.experts.dtype == dtype
    assert_holds(routed, ids)
    assert (routed.num_tokens, routed.num_layers, routed.top_k) == (6, 4, 3)


def test_ids_past_256_survive():
    ids = random_ids() + 505
    for given in (ids.to(torch.uint16), ids.numpy().astype(np.uint16), ids.int()):
        routed = RoutedExperts.from_ids(given, num_experts=513)
        assert_holds(routed, ids)
        assert_holds(RoutedExperts.pad([routed, routed])[:, :2], torch.stack([ids[:2], ids[:2]]))
        assert torch.equal(routed[torch.tensor([3, 1])].layer(2)[0].long(), ids[[3, 1], 2])


def test_rows_of_minus_one_are_missing():
    ids = random_ids()
    ids[2, 1], ids[5] = -1, -1
    routed = RoutedExperts.from_ids(ids.to(torch.int8), num_experts=8)
    assert_holds(routed, ids, ids[..., 0] >= 0)
    assert routed.num_missing() == 2
    mask = torch.tensor([True] * 5 + [False])
    assert routed.num_missing(mask) == 1
    assert RoutedExperts.from_ids(random_ids(), num_experts=8).num_missing() == 0


@pytest.mark.parametrize("per_layer", [False, True])
def test_validity_is_per_token_or_per_layer(per_layer):
    ids, valid = random_ids(), torch.tensor([True, False, True, True, False, True])
    if per_layer:
        valid = valid[:, None] & torch.tensor([True, True, False, True])
    ids[1] = 77  # ignored, since it is not valid
    assert_holds(
        RoutedExperts.from_ids(ids, num_experts=8, valid=valid),
        ids,
        valid if per_layer else valid[:, None].expand(6, 4),
    )


@pytest.mark.parametrize("first_token", [0, 3])
@pytest.mark.parametrize("encode", [lambda array: array, npy], ids=["array", "base64"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_from_vllm(dtype, encode, first_token):
    """The last token has no row, the skipped first tokens have none, and the dense first layer is left out."""
    ids = random_ids(9)
    payload = encode(ids[first_token:8].numpy().astype(dtype))
    routed = RoutedExperts.from_vllm(payload, num_experts=8, num_tokens=9, first_token=first_token, layers=[1, 2, 3])
    known = (torch.arange(9) >= first_token) & (torch.arange(9) < 8)
    assert_holds(routed, ids[:, 1:], known[:, None].expand(9, 3))
    assert routed.num_missing() == 1 + first_token


@pytest.mark.parametrize("dtype", ["int32", "uint16", "uint8"])
def test_from_sglang(dtype):
    ids = random_ids(9)
    options = {"num_experts": 8, "num_layers": 4, "top_k": 3, "num_tokens": 9}
    array = ids[:8].numpy().astype(dtype)
    known = (torch.arange(9) < 8)[:, None].expand(9, 4)
    assert_holds(RoutedExperts.from_sglang(raw(array), dtype=dtype, **options), ids, known)
    assert_holds(RoutedExperts.from_sglang(raw(array).encode(), dtype=dtype, **options), ids, known)
    assert_holds(RoutedExperts.from_sglang(array, **options), ids, known)
    with pytest.raises(ValueError, match=r"\[rows, 4, 2\]"):
        RoutedExperts.from_sglang(array, **{**options, "top_k": 2})


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_from_nemo_rl(dtype):
    ids = random_ids()
    ids[4:] = -1
    known = ids[..., 0] >= 0
    array = ids.numpy().astype(dtype)
    assert_holds(RoutedExperts.from_nemo_rl(f"nrlre1:{dtype}:6x4x3:{raw(array)}", num_experts=8), ids, known)
    assert_holds(RoutedExperts.from_nemo_rl(torch.from_numpy(array), num_experts=8), ids, known)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_from_prime_rl(dtype):
    ids = random_ids()
    ids[5] = 0  # prime-rl's padding
    array = ids.numpy().astype(dtype)
    for data in (array.tobytes(), raw(array)):
        routed = RoutedExperts.from_prime_rl(data, [6, 4, 3], dtype, num_experts=8, num_recorded=5)
        assert_holds(routed, ids, (torch.arange(6) < 5)[:, None].expand(6, 4))
    with pytest.raises(ValueError, match=r"has an expert twice at token 5, layer 0: \[0, 0, 0\] must differ"):
        RoutedExperts.from_prime_rl(array.tobytes(), [6, 4, 3], dtype, num_experts=8, num_recorded=6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_and_packed(side):
    ids = [random_ids(tokens, seed=tokens) for tokens in (3, 5, 1)]
    sequences = [RoutedExperts.from_ids(one, num_experts=8) for one in ids]
    packed = RoutedExperts.pack(sequences)
    assert_holds(packed, torch.cat(ids))
    padded = RoutedExperts.pad(sequences, 6, side=side)
    assert padded.experts.shape == (3, 6, 4, 3)
    assert padded.num_missing() == 18 - 9
    for row, one in enumerate(ids):
        span = slice(0, len(one)) if side == "right" else slice(6 - len(one), 6)
        assert_holds(padded[row][span], one)
    assert RoutedExperts.pad(sequences).experts.shape[1] == 5
    # a mini-batch; its rows follow the flattened [B * L], as in the model
    part = padded[1:, 2:]
    experts, valid = part.layer(3)
    assert torch.equal(experts, padded.experts[1:, 2:, 3].reshape(8, 3))
    assert torch.equal(valid, padded.valid[1:, 2:, 3].reshape(8))


def test_to_another_device():
    routed = RoutedExperts.from_ids(random_ids(), num_experts=8).to("meta")
    assert routed.experts.device.type == routed.valid.device.type == "meta"


GOOD = random_ids()


def changed(place, value):
    ids = random_ids()
    ids[place] = value
    return ids


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ({"ids": changed((4, 2, 1), 8)}, ValueError, r"has the expert 8 at token 4, layer 2: .* must be in \[0, 8\)"),
        ({"ids": changed((4, 2, 1), -1)}, ValueError, "has the expert -1 at token 4, layer 2"),
        ({"ids": changed((4, 2, 1), 2**32 + 1)}, ValueError, "has the expert 4294967297 at token 4, layer 2"),
        ({"ids": changed((4, 2), 3)}, ValueError, r"twice at token 4, layer 2: \[3, 3, 3\] must differ"),
        ({"first_token": 2, "num_tokens": 8, "ids": changed((4, 2, 1), 8)}, ValueError, "at token 6, layer 2"),
        ({"num_tokens": 5}, ValueError, "has 6 rows from token 0 on: they must fit into 5 tokens"),
        ({"num_tokens": 7, "first_token": 2}, ValueError, "has 6 rows from token 2 on: they must fit into 7 tokens"),
        ({"first_token": -1}, ValueError, "from token -1 on"),
        ({"layers": [1, 4]}, ValueError, "layers has 4: routed_experts has the layers 0 to 3"),
        ({"ids": GOOD[0]}, ValueError, r"shape \(4, 3\): it must be \[rows, layers, K\]"),
        ({"ids": GOOD.float()}, TypeError, "float32: it must be integers"),
        (
            {"valid": torch.ones(5, dtype=torch.bool)},
            ValueError,
            r"valid has shape \(5,\): it must be \(6,\) or \(6, 4\)",
        ),
        ({"valid": torch.ones(6)}, TypeError, "valid has dtype torch.float32: it must be bool"),
        ({"num_experts": 0}, ValueError, "num_experts is 0: it must be from 1"),
        ({"num_experts": 70_000}, ValueError, "num_experts is 70000: it must be from 1 to 65536"),
    ],
)
def test_what_ids_may_not_be(call, error, said):
    with pytest.raises(error, match=said):
        RoutedExperts.from_ids(**{"ids": GOOD, "num_experts": 8, **call})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: RoutedExperts.from_vllm("AAAA", num_experts=8, num_tokens=3), r"base64 string of an \.npy file"),
        (lambda: RoutedExperts.from_vllm("?", num_experts=8, num_tokens=3), "must be base64"),
        (
            lambda: RoutedExperts.from_sglang("AAAA", num_experts=8, num_layers=1, top_k=1, num_tokens=3),
            r"has 3 bytes: they must make int32 of shape \[-1, 1, 1\]",
        ),
        (lambda: RoutedExperts.from_nemo_rl("nrlre2:int8:1x1x1:AA==", num_experts=8), "must be 'nrlre1:<dtype>"),
        (lambda: RoutedExperts.from_nemo_rl("nrlre1:int8:1x1:AA==", num_experts=8), "'1x1': it must be '<S>x<L>x<K>'"),
        (lambda: RoutedExperts.from_nemo_rl("nrlre1:float32:1x1x1:AAAAAA==", num_experts=8), "must name integers"),
        (
            lambda: RoutedExperts.from_prime_rl(b"12", [1, 1, 1], num_experts=8, num_recorded=1),
            r"has 2 bytes: they must make uint8 of shape \[1, 1, 1\]",
        ),
        (
            lambda: RoutedExperts.from_prime_rl(b"1", [1, 1, 1], num_experts=80, num_recorded=2),
            "num_recorded is 2: it must be at most the 1 tokens",
        ),
    ],
)
def test_payloads_that_do_not_decode(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_sequences_that_do_not_go_together():
    one, other = (RoutedExperts.from_ids(random_ids(layers=layers), num_experts=8) for layers in (4, 3))
    with pytest.raises(ValueError, match=r"sequences\[1\] has \(layers, K, experts\) \(3, 3, 8\): .*\(4, 3, 8\)"):
        RoutedExperts.pack([one, other])
    with pytest.raises(ValueError, match="sequences is empty"):
        RoutedExperts.pad([])
    with pytest.raises(ValueError, match="length is 5: it must be at least 6, the length of the longest sequence"):
        RoutedExperts.pad([one], 5)
    with pytest.raises(ValueError, match="side is 'top'"):
        RoutedExperts.pad([one], side="top")
    with pytest.raises(IndexError, match="2 indices: it has 1 dimensions of tokens"):
        one[0, 1]
