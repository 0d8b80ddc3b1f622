"""Bytes that our kernels move, compared with the kernels of TRL and Liger in the same interpreter."""

import pytest
import torch
import triton_cases
from triton_cases import random_ids, random_logits

pytest.importorskip("triton", reason="triton is not installed")

from minirl_kernels import PolicyLossConfig, fused_policy_loss, token_logprobs
from verify import cases
from verify.interpreter import recording
from verify.rows import QWEN3_VOCAB
from verify.traffic import traffic

pytestmark = triton_cases.interpreter_only()

TOKENS, VOCAB_SIZE = 5, 16_000


def moved(call):
    """(loaded, stored) by all launches of a call, times the logits of the tokens that count.

    Rounded to hundredths, because each token also has a few numbers of its own: its temperature, its metrics.
    """
    with recording() as launches:
        call()
    logits = 4 * (TOKENS - 1) * VOCAB_SIZE
    return tuple(round(amount / logits, 2) for amount in traffic(*launches))


@pytest.fixture
def rows():
    logits = random_logits(1, TOKENS, VOCAB_SIZE)
    return logits, random_ids(logits)  # one of five is ignored


def our_logprobs(logits, token_ids):
    leaf = logits.clone().requires_grad_()
    values = token_logprobs(leaf, token_ids, with_entropy=True, backend="triton")
    torch.autograd.backward(values, [torch.ones_like(v) for v in values])


def our_loss(logits, token_ids, config=PolicyLossConfig.grpo(rollout_is=None), **options):  # noqa: B008
    leaf = logits.clone().requires_grad_()
    ones = torch.ones(token_ids.shape)
    out = fused_policy_loss(
        leaf,
        token_ids,
        old_log_probs=-ones,
        rollout_log_probs=None,
        advantages=ones[:, 0],
        loss_mask=None,
        config=config,
        backend="triton",
        **options,
    )
    out.loss.backward()


def test_log_probabilities_against_trl(rows):
    """Both read the logits twice and write the gradient once; the gradient of an ignored token is zeros."""
    kernels = pytest.importorskip("trl.kernels.logprob_entropy", reason="trl is not installed")
    logits, token_ids = rows

    def theirs():
        leaf = logits.clone().requires_grad_()
        values = kernels.selective_log_softmax_and_entropy(leaf, token_ids.clamp(min=0), 1.0, token_ids >= 0)
        torch.autograd.backward(values, [torch.ones_like(v) for v in values])

    ours, peer = moved(lambda: our_logprobs(*rows)), moved(theirs)
    assert ours == (2.0, 1.25)
    assert peer == (2.01, 1.25)


def test_fused_loss_against_liger(rows):
    """We read the logits once for loss and gradient; a forward and a backward read them twice."""
    grpo_loss = pytest.importorskip("liger_kernel.transformers.grpo_loss", reason="liger-kernel is not installed")
    logits, token_ids = rows

    def theirs():
        # the logits of Liger have one more position: each scores the next token
        leaf = torch.cat([logits, logits[:, :1]], dim=1).requires_grad_()
        mask = (token_ids >= 0).float()
        loss, *_ = grpo_loss.triton_grpo_loss(
            leaf,
            torch.full((1, TOKENS), -1.0),
            None,
            token_ids.clamp(min=0),
            torch.ones(1),
            mask,
            temperature=1.0,
            beta=0.0,
            eps_low=0.2,
            eps_high=0.27,
            inplace=False,
            reduce=True,
        )
        loss.backward()

    ours, peer = moved(lambda: our_loss(*rows)), moved(theirs)
    assert ours == (1.0, 1.25)
    assert peer == (2.0, 1.25)


def test_a_long_row_is_read_twice_less_a_tile():
    """By its launch configuration, because the case with the vocabulary of Qwen3 is not run."""
    for case in cases.compile_cases():
        if case.name == "fused_policy_loss" and case.size == f"{QWEN3_VOCAB:,}":
            assert case.most_loaded(0) / case.unit_bytes < 1.98
