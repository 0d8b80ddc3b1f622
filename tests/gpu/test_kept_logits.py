"""Kept tokens in the Triton kernels on a GPU: the interpreter's checks, and checks that need hardware."""

import pytest
import torch
from dtypes import DTYPES
from kept_cases import check_linear, check_token_logprobs, random_mask
from linear_head import random_head
from linear_logprobs_cases import OPTIONS
from triton_cases import random_ids, random_logits

from minirl_kernels import SamplingMask, token_logprobs

DEVICE = "cuda"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 2, 257, 4097, 32_000, 50_257, 151_936])
def test_any_vocabulary(vocab_size, dtype):
    logits = random_logits(10, vocab_size, dtype=dtype)
    check_token_logprobs(logits, random_ids(logits), "triton", device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_linear_token_logprobs(options, dtype):
    options = dict(options)
    head = random_head(7, 64, 1032, dtype, with_bias=options.pop("with_bias", False))
    head[2][[1, 5]] = -100
    check_linear(head, "triton", DEVICE, **options)


def test_a_token_outside_of_its_set_is_nan_or_raises():
    logits, token_ids = random_logits(3, 40).to(DEVICE), torch.tensor([3, 7, 5], device=DEVICE)
    kept = SamplingMask.from_sets([[3], [4, 6], None]).to(DEVICE)
    log_probs = token_logprobs(logits, token_ids, kept=kept)
    assert log_probs.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"^token_ids has the id 7 at row 1, which is not among"):
        token_logprobs(logits, token_ids, kept=kept, check=True)


def test_the_host_does_not_wait():
    logits = random_logits(10, 300).to(DEVICE)
    token_ids, kept = random_ids(logits.cpu()).to(DEVICE), random_mask(random_ids(logits.cpu()), 300).to(DEVICE)
    token_logprobs(logits, token_ids, kept=kept)
    torch.cuda.set_sync_debug_mode("error")
    try:
        token_logprobs(logits, token_ids, kept=kept, with_entropy=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bits_repeat():
    logits = random_logits(300, 151_936).to(DEVICE)
    token_ids = random_ids(logits.cpu())
    kept = random_mask(token_ids[:20], 151_936)
    results = [token_logprobs(logits[:20], token_ids[:20].to(DEVICE), kept=kept.to(DEVICE)) for _ in range(2)]
    assert torch.equal(*results)
    alone = token_logprobs(logits[3:5], token_ids[3:5].to(DEVICE), kept=kept[3:5].to(DEVICE))
    assert torch.equal(alone, results[0][3:5])
