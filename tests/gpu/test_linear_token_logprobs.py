"""linear_token_logprobs on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from equations import upstream
from gpu_waits import count_waits
from linear_head import random_head
from linear_logprobs_cases import OPTIONS, call, check_against_equations

from minirl_kernels import linear_token_logprobs

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype):
    options = dict(options)
    head = random_head(7, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    head[2][[1, 6]] = -100
    check_against_equations(head, "triton", DEVICE, **options)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 4096, 20_011, 40_000, 50_257, 151_936])
def test_rows_of_many_blocks(vocab_size, dtype, options):
    """16-bit gradients overwrite float32 logits, of which some are still to be read."""
    options = dict(options)
    head = random_head(48, 64, vocab_size, dtype, with_bias=options.pop("with_bias", False))
    check_against_equations(head, "triton", DEVICE, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(dtype, monkeypatch):
    from minirl_kernels.ops.linear_token_logprobs import triton

    monkeypatch.setattr(triton, "rows_per_tile", lambda *_: 128)
    check_against_equations(random_head(300, 64, 4097, dtype), "triton", DEVICE)


def test_shapes_of_every_kind():
    for shape in ((0,), (0, 3), (3, 0)):
        ids = torch.zeros(shape, dtype=torch.int64)
        results = call(torch.ones(*shape, 4), torch.ones(7, 4), ids, None, "triton", device=DEVICE)
        assert [tuple(values.shape) for values in results] == [shape, shape, (*shape, 4), (7, 4)]
        assert not results[-1].any()


def test_the_same_bits_every_time():
    head = random_head(300, 64, 50_257, torch.bfloat16)
    first, second = (call(*head, "triton", device=DEVICE) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("bad", [-1, 33, 2**40])
def test_an_id_out_of_range_is_nan_or_raises(bad):
    hidden, weight, token_ids, _ = random_head(7, 9, 33)
    token_ids[4] = bad
    results = call(hidden, weight, token_ids, None, "triton", device=DEVICE)
    for values in results[:3]:
        assert values[4].isnan().all()
        assert values[[0, 1, 2, 3, 5, 6]].isfinite().all()
    with pytest.raises(ValueError, match=rf"^token_ids has the id {bad} at row 4"):
        linear_token_logprobs(hidden.to(DEVICE), weight.to(DEVICE), token_ids.to(DEVICE), check=True)


def test_a_pass_waits_for_the_gpu_once():
    hidden, weight, token_ids, _ = (None if x is None else x.to(DEVICE) for x in random_head(50, 64, 1000))
    token_ids[::3] = -100
    grad = upstream(token_ids.cpu())[0].to(DEVICE)
    leaves = hidden.requires_grad_(), weight.requires_grad_()

    assert count_waits(lambda: linear_token_logprobs(*leaves, token_ids)) == 1
    log_probs = linear_token_logprobs(*leaves, token_ids)
    assert count_waits(lambda: torch.autograd.grad(log_probs, leaves, grad, retain_graph=True)) == 1
