"""A row has the same bits on every instruction set, for any number of threads, in any batch and at any place.

Random logits would hide most changes of order: the last bit of a large sum does not change a large logarithm. Here the
sampled token is nearly certain. So its log-probability and entropy are small, and show the last bit of the sum.
"""

from dataclasses import replace

import pytest
import torch
from dtypes import DTYPES
from policy_batches import assert_same_bits, random_batch

from minirl_kernels import PolicyLossConfig, fused_policy_loss, policy_loss, token_logprobs
from minirl_kernels.backends import native

CONFIGS = {
    "minirl": PolicyLossConfig(kl_coef=0.1, entropy_coef=0.1),
    "grpo": PolicyLossConfig.grpo(rollout_is="token", rollout_is_threshold=5.0),
    "cispo": PolicyLossConfig.cispo(loss_agg_mode="token-mean", kl_coef=0.1, kl_estimator="k1"),
    "gspo": PolicyLossConfig.gspo(entropy_coef=0.1),
}


def sensitive_rows(size, vocab_size, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, vocab_size, generator=gen)
    token_ids = torch.randint(vocab_size, (size,), generator=gen)
    logits[torch.arange(size), token_ids] = 14.0
    return logits.to(dtype), token_ids


def sensitive_batch(lengths, vocab_size, dtype=torch.float32):
    batch = random_batch(lengths, vocab_size=2)
    logits, token_ids = sensitive_rows(sum(lengths), vocab_size, dtype)
    near = torch.full_like(batch.old_log_probs, -0.01)
    return replace(
        batch,
        logits=logits,
        token_ids=token_ids,
        old_log_probs=near + (batch.old_log_probs - batch.ref_log_probs) / 3,
        rollout_log_probs=near,
        ref_log_probs=near,
    )


def logprob_bits(logits, token_ids, backend="cpu"):
    logits = logits.detach().requires_grad_()
    results = token_logprobs(logits, token_ids, temperature=0.9, with_entropy=True, backend=backend)
    return *(values.detach() for values in results), *torch.autograd.grad(sum(results).sum(), logits)


def loss_bits(batch, config, layout="packed", **options):
    """Every result of the fused loss, [T] or [T, V].

    The counts are fixed, as if the batch were part of a mini-batch.
    """
    logits = batch.lay_out(batch.logits.clone(), layout).requires_grad_()
    out = fused_policy_loss(
        logits * 1,
        batch.lay_out(batch.token_ids, layout),
        config=config,
        backend="cpu",
        temperature=0.9,
        num_responses=10,
        num_tokens=100,
        **batch.arguments(layout),
        **options,
    )
    out.loss.backward()
    per_token = (out.log_probs, out.entropy, out.token_loss, out.token_grad, logits.grad)
    return tuple(batch.pack(values, layout) for values in per_token)


def test_the_data_would_show_another_order():
    """The same exponentials in another order of float32 addition give most rows other bits."""
    logits, token_ids = sensitive_rows(100, 4097)
    p = (logits - logits.amax(-1, keepdim=True)).exp()[:, :4096]

    def log_sum(lanes):
        partial = torch.zeros(100, lanes)
        for start in range(0, 4096, lanes):
            partial += p[:, start : start + lanes]
        total = torch.zeros(100)
        for lane in range(lanes):
            total += partial[:, lane]
        return total.log()

    for lanes in (8, 32, 64):
        assert (log_sum(16) != log_sum(lanes)).float().mean() > 0.5
    log_probs, entropy, _ = logprob_bits(logits, token_ids, "reference")
    assert log_probs.abs().max() < 0.05
    assert entropy.max() < 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [17, 1000, 4097, 32000])
def test_token_logprobs_on_every_instruction_set(vocab_size, dtype, cpu, set_isa):
    logits, token_ids = sensitive_rows(9, vocab_size, dtype)
    token_ids[4] = -100
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        results.append(logprob_bits(logits, token_ids))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_fused_policy_loss_on_every_instruction_set(config, dtype, overwrite, cpu, set_isa):
    batch = sensitive_batch([5, 1, 4, 6], 4097, dtype)
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        results.append(loss_bits(batch, config, overwrite_logits=overwrite))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_gradients_on_every_instruction_set(dtype, cpu, set_isa):
    """bfloat16 conversion in hardware flushes subnormal gradients to 0; not all instruction sets have it."""
    logits, token_ids = sensitive_rows(6, 1000)
    results = []
    for isa in native().isa_supported():
        set_isa(isa)
        leaf = logits.to(dtype).requires_grad_()
        log_probs = token_logprobs(leaf, token_ids, backend="cpu")
        scales = torch.tensor([1e-30, 1e-33, 1e-36, 1e-38, 1e-5, 1e-3])
        results.append(torch.autograd.grad(log_probs, leaf, scales))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    grad = results[0][0].float().abs()
    assert ((grad > 0) & (grad < torch.finfo(dtype).tiny)).any()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_threads(config, cpu, threads):
    """Threads share the rows; no sum over a row is split."""
    batch = sensitive_batch([40, 1, 30, 29], 4097)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append((*loss_bits(batch, config), *logprob_bits(batch.logits, batch.token_ids)))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize(
    ("preset", "shape"),
    [("minirl", (1, 70_000)), ("sequence_is", (3, 34_000)), ("gspo", (1, 70_000)), ("minirl", (34_000, 2))],
)
def test_threads_of_the_losses_sums(preset, shape, threads):
    """Torch splits the sum of one long row over threads. Loss and metrics must not depend on it."""
    batch = random_batch([shape[1]] * shape[0], spread=0.001)
    results = []
    for count in (1, 2, 3):
        threads(count)
        for layout in ("padded", "packed"):
            log_probs = batch.lay_out(batch.log_probs, layout)
            out = policy_loss(log_probs, config=PolicyLossConfig.preset(preset), **batch.arguments(layout))
            per_token = (batch.pack(values, layout) for values in (out.token_loss, out.token_grad))
            results.append((out.loss, out.metrics.sums, out.metrics.maxima, *per_token))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("vocab_size", [1000, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_any_batch_and_place(dtype, vocab_size, cpu):
    """A row has the same bits alone, among others, in another order, as [B, L], and at odd addresses."""
    logits, token_ids = sensitive_rows(12, vocab_size, dtype)
    together = logprob_bits(logits, token_ids)
    for row in range(12):
        alone = logprob_bits(logits[row : row + 1], token_ids[row : row + 1])
        assert_same_bits(alone, [values[row : row + 1] for values in together])

    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(order, torch.arange(12))
    moved = logprob_bits(logits[order], token_ids[order])
    assert_same_bits(moved, [values[order] for values in together])

    matrix = logprob_bits(logits.reshape(3, 4, vocab_size), token_ids.reshape(3, 4))
    assert_same_bits([values.reshape(theirs.shape) for values, theirs in zip(matrix, together, strict=True)], together)

    for stride, offset in ((vocab_size + 1, 1), (2 * vocab_size, 3), (vocab_size, 7)):
        storage = torch.zeros(13 * stride + offset, dtype=dtype)
        view = storage.as_strided(logits.shape, (stride, 1), offset)
        view.copy_(logits)
        assert_same_bits(logprob_bits(view, token_ids), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_response_in_any_batch(config, dtype, cpu):
    """The tokens of a response have the same bits alone, after other responses, and with any padding."""
    batch = sensitive_batch([5, 1, 4, 9, 3], 1000, dtype)
    together = loss_bits(batch, config)
    assert_same_bits(loss_bits(batch, config, "padded"), together)
    for response, (start, end) in enumerate(batch.spans()):
        alone = batch.responses(response, response + 1)
        for layout in ("packed", "padded"):
            assert_same_bits(loss_bits(alone, config, layout), [values[start:end] for values in together])


@pytest.mark.parametrize("preset", ["sequence_is", "gspo"])
def test_a_response_built_to_cancel(preset):
    """The sum of log-ratios of 1e9 and 0.01 has other digits in any order except the order of the tokens."""
    gen = torch.Generator().manual_seed(0)
    big = torch.randn(250, generator=gen) * 1e9
    log_r = torch.cat([big, -big, torch.randn(500, generator=gen) / 100])[torch.randperm(1000, generator=gen)]
    assert log_r.double().sum() != log_r.double().flip(0).cumsum(0)[-1]
    batch = replace(
        random_batch([1000, 7]),
        log_probs=torch.zeros(1007),
        old_log_probs=torch.cat([-log_r, torch.zeros(7)]),
        rollout_log_probs=None,
        loss_mask=torch.ones(1007, dtype=torch.bool),
    )
    config = PolicyLossConfig.preset(preset, rollout_is=None, clip=False)

    def token_grad(part, layout):
        log_probs = part.lay_out(part.log_probs, layout)
        out = policy_loss(log_probs, config=config, num_responses=2, **part.arguments(layout))
        return part.pack(out.token_grad, layout)

    together = token_grad(batch, "packed")
    assert torch.equal(token_grad(batch, "padded"), together)
    for layout in ("packed", "padded"):
        assert torch.equal(token_grad(batch.responses(0, 1), layout), together[:1000])
