"""Kept tokens in the Triton kernels, in Triton's interpreter: values and masks; hardware is not tested."""

import math

import pytest
import torch
import triton_cases
from dtypes import DTYPES
from kept_cases import (
    check_head_outside_of_the_sets,
    check_linear,
    check_token_logprobs,
    forward_backward,
    mask_of,
    random_mask,
    random_sets,
)
from linear_head import random_head
from linear_logprobs_cases import OPTIONS
from policy_batches import random_batch
from triton_cases import random_ids, random_logits
from verify.launches import captured

from minirl_kernels import PolicyLossConfig, SamplingMask, fused_linear_policy_loss, fused_policy_loss
from minirl_kernels.ops.kept_logits import triton as kernels
from minirl_kernels.ops.kept_logits.op import KeptRows
from minirl_kernels.ops.linear_token_logprobs import triton as head_kernels

pytestmark = triton_cases.interpreter_only()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 257, 20_011])
def test_values_and_gradients(vocab_size, dtype):
    logits = random_logits(10, vocab_size, dtype=dtype)
    check_token_logprobs(logits, random_ids(logits), "triton", torch.linspace(0.3, 2, 10))


def test_rows_by_their_strides():
    buffer = random_logits(3, 4, 96)
    for logits in (buffer[:, 1:, :90], buffer.transpose(0, 1)[1:, :, 3:80], buffer[:, ::2]):
        check_token_logprobs(logits, random_ids(logits, dtype=torch.int32), "triton")


@pytest.mark.parametrize("first", [0, 700, 20_000])
def test_a_tile_has_any_part_of_a_set(first):
    """Kept tokens lie at both ends of a tile, in no tile, in all tiles, or in other shards of the vocabulary."""
    vocab_size = 20_011
    tile = kernels.launch_config(vocab_size, torch.float32).tile
    sets = [
        [0, tile - 1, tile, vocab_size - 1],
        list(range(tile + 3, 2 * tile, 5)),
        [1, 3 * tile + 5],
        list(range(2 * tile - 9, 2 * tile + 9)),
        list(range(7, vocab_size, 1000)),
        [],
    ]
    mask = SamplingMask.from_sets([[first + token for token in one] for one in sets])
    outside = [first - 1, first + vocab_size] if first else [vocab_size]
    with_others = SamplingMask.from_sets([[first + token for token in one] + outside for one in sets])
    logits = random_logits(6, vocab_size)
    expected = torch.full_like(logits, -math.inf)
    for row, one in enumerate(sets):
        expected[row, one or slice(None)] = logits[row, one or slice(None)]
    for one in (mask, with_others):
        kept = logits.clone()
        kernels.keep_(kept, KeptRows.of(one.token_ids - first, one.offsets))
        rows = slice(0, 5) if one is with_others else slice(None)
        assert torch.equal(kept[rows], expected[rows])
    assert not kept[5].isfinite().any()  # all kept tokens of this row are in other shards


@pytest.mark.parametrize("vocab_size", [999, 20_011])
def test_bits_of_a_position_depend_on_its_own_set_alone(vocab_size):
    logits = random_logits(10, vocab_size)
    token_ids = random_ids(logits)
    sets = random_sets(token_ids, vocab_size)
    together = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), "triton")
    wider = [None if number % 3 else one for number, one in enumerate(sets)]
    others = forward_backward(logits, token_ids, SamplingMask.from_sets(wider), "triton")
    assert all(torch.equal(a[::3], b[::3]) for a, b in zip(others, together, strict=True))
    whole = forward_backward(logits, token_ids, None, "triton")
    assert all(torch.equal(a[::5], b[::5]) for a, b in zip(whole, together, strict=True))  # these rows have no set


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_linear_token_logprobs(options, dtype, monkeypatch):
    """Every option of the head, with ignored rows, in tiles of three rows. A softcap must keep -inf."""
    monkeypatch.setattr(head_kernels, "rows_per_tile", lambda *_: 3)
    options = dict(options)
    head = random_head(7, 40, 515, dtype, with_bias=options.pop("with_bias", False))
    head[2][[1, 5]] = -100
    check_linear(head, "triton", **options)


def test_the_head_is_told_nothing_of_what_was_not_kept():
    check_head_outside_of_the_sets("triton")


@pytest.mark.parametrize("preset", ["minirl", "gspo"])
def test_losses_are_those_of_the_reference(preset):
    config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.1)
    hidden, weight, token_ids, _ = random_head(10, 24, 300)
    batch = random_batch([4, 1, 5])
    shared = {"kept": random_mask(token_ids, 300), "config": config, **batch.arguments("packed")}
    results = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        from_hidden = fused_linear_policy_loss(*leaves, token_ids, backend=backend, **shared)
        logits = leaves[0] @ leaves[1].T
        from_logits = fused_policy_loss(logits, token_ids, overwrite_logits=True, backend=backend, **shared)
        for out in (from_hidden, from_logits):
            grads = torch.autograd.grad(out.loss, leaves, retain_graph=True)
            results.append((out.loss.detach(), out.log_probs.detach(), out.entropy.detach(), *grads))
    for ours in results[:2]:
        for values, theirs in zip(ours, results[2], strict=True):
            assert (values - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([[3], [4, 6], [5]], "^token_ids has the id 7 at row 1, which is not among the 2 tokens"),
        ([[3], [7, 40], [5]], "^kept has the id 40 at row 1: an id must be below 40"),
    ],
)
def test_a_set_that_cannot_be_is_nan_or_raises(sets, message):
    """NaN at the invalid position only. A ratio of 0 would look like a token that is legally left out."""
    logits, token_ids = random_logits(3, 40), torch.tensor([3, 7, 5])
    good = forward_backward(logits, token_ids, SamplingMask.from_sets([[3], [7, 6], [5]]), "triton")
    ours = forward_backward(logits, token_ids, SamplingMask.from_sets(sets), "triton")
    for values, others in zip(ours, good, strict=True):
        assert values[1].isnan().all()
        assert torch.equal(values[[0, 2]], others[[0, 2]])
    with pytest.raises(ValueError, match=message):
        forward_backward(logits, token_ids, SamplingMask.from_sets(sets), "triton", check=True)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_zero_tokens(shape):
    token_ids = torch.zeros(shape, dtype=torch.int64)
    results = forward_backward(torch.zeros(*shape, 7), token_ids, mask_of([], shape), "triton")
    assert [tuple(values.shape) for values in results] == [shape, shape, (*shape, 7)]


def test_more_rows_than_a_grid_has_on_its_other_axes():
    logits = torch.empty(1, 40).expand(70_000, 40)
    with captured() as launches:
        kernels.keep_(logits, KeptRows.of(torch.zeros(0, dtype=torch.int32), torch.zeros(70_001, dtype=torch.int32)))
    assert [launch.grid for launch in launches] == [(70_000, 1)]
