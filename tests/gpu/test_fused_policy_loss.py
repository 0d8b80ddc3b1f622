"""The Triton kernel of fused_policy_loss on a GPU: the interpreter's checks, and checks that need hardware."""

from dataclasses import replace

import pytest
import torch
from dtypes import DTYPES
from policy_batches import TOKEN_LEVEL, batch_at_bounds, random_batch
from triton_cases import check_fused_policy_loss, random_logits, variants

from minirl_kernels import PolicyLossConfig, fused_policy_loss

DEVICE = "cuda"
LENGTHS = [3, 1, 2, 4]


def arguments_of(batch, layout="padded"):
    """(logits, token_ids, other arguments) on the GPU."""
    arguments = {
        name: values.to(DEVICE) if isinstance(values, torch.Tensor) else values
        for name, values in batch.arguments(layout).items()
    }
    rows = (batch.lay_out(values, layout).to(DEVICE, copy=True) for values in (batch.logits, batch.token_ids))
    return *rows, arguments


@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_every_option(preset):
    for seed, config in enumerate(variants(PolicyLossConfig.preset(preset, loss_agg_mode="token-mean"))):
        batch = random_batch(LENGTHS, vocab_size=33, seed=seed)
        check_fused_policy_loss(batch, config, device=DEVICE)
        check_fused_policy_loss(replace(batch, old_log_probs=None), config, device=DEVICE)


@pytest.mark.parametrize(
    ("preset", "rollout_is"),
    [("minirl", "token"), ("minirl", "sequence"), ("minirl", None), ("grpo", "token"), ("cispo", "token")],
)
def test_either_side_of_every_bound(preset, rollout_is):
    config = PolicyLossConfig.preset(preset, rollout_is=rollout_is, loss_agg_mode="token-mean")
    if rollout_is is not None or config.weighs_by_w:
        config = replace(config, rollout_is_threshold=5.0)
    check_fused_policy_loss(batch_at_bounds(config, vocab_size=17), config, device=DEVICE)


@pytest.mark.parametrize("preset", ["gspo", "sequence_is"])
def test_two_phases(preset):
    config = PolicyLossConfig.preset(preset, entropy_coef=0.01)
    check_fused_policy_loss(random_batch(LENGTHS, vocab_size=33), config, device=DEVICE)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(dtype, layout, overwrite):
    batch = random_batch(LENGTHS, vocab_size=257, dtype=dtype)
    config = PolicyLossConfig(entropy_coef=0.01)
    check_fused_policy_loss(batch, config, layout=layout, overwrite=overwrite, device=DEVICE)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 1000, 4097, 16_384, 20_011, 32_768, 50_257, 151_936])
def test_any_vocabulary(vocab_size, dtype, overwrite):
    batch = random_batch([2, 3], vocab_size=vocab_size, dtype=dtype)
    check_fused_policy_loss(batch, PolicyLossConfig(entropy_coef=0.01), overwrite=overwrite, device=DEVICE)


@pytest.mark.parametrize("vocab_size", [999, 32_000, 151_936])
def test_the_bits_of_a_row_depend_on_nothing_but_the_row(vocab_size):
    """The bits are also the same when the gradient overwrites the logits."""
    config = PolicyLossConfig(entropy_coef=0.01)
    batch = random_batch([60] * 5, vocab_size=vocab_size, dtype=torch.bfloat16)

    def run(part, overwrite):
        logits, token_ids, arguments = arguments_of(part, "packed")
        leaf = logits.requires_grad_()
        out = fused_policy_loss(
            leaf * 1, token_ids, config=config, num_responses=5, overwrite_logits=overwrite, **arguments
        )
        out.loss.backward()
        return out.log_probs, out.entropy, out.token_loss, out.token_grad, leaf.grad

    together = run(batch, overwrite=False)
    for first, last in ((0, 1), (2, 4), (0, 5)):
        rows = slice(60 * first, 60 * last)
        alone = run(batch.responses(first, last), overwrite=True)
        assert all(torch.equal(values[rows], one) for values, one in zip(together, alone, strict=True))


@pytest.mark.parametrize("factor", [1.0, -0.37])
def test_nothing_waits_for_the_gpu(factor):
    logits, token_ids, arguments = arguments_of(random_batch(LENGTHS, vocab_size=100))
    factor = torch.tensor(factor, device=DEVICE)

    def run():
        leaf = logits.clone().requires_grad_()
        out = fused_policy_loss(leaf, token_ids, **arguments)
        (out.loss * factor).backward()
        return leaf.grad, out.token_grad

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_overwriting_allocates_nothing_that_grows_with_the_vocabulary():
    logits, token_ids, arguments = arguments_of(random_batch([16] * 4, vocab_size=32_000))
    logits = logits.requires_grad_() * 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    # the backward of the logits themselves would allocate their gradient
    torch.autograd.grad(fused_policy_loss(logits, token_ids, overwrite_logits=True, **arguments).loss, logits)
    assert torch.cuda.max_memory_allocated() - before < logits.nbytes // 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_in_place(dtype):
    from minirl_kernels.common.triton.scale import scale_in_place

    buffer = random_logits(2, 3, 9010, dtype=dtype).to(DEVICE)
    expected = buffer.clone()
    expected[:, :2, :9001] = (buffer[:, :2, :9001].float() * -0.37).to(dtype)
    scale_in_place(buffer[:, :2, :9001], torch.tensor(1.0, device=DEVICE))
    scale_in_place(buffer[:, :2, :9001], torch.tensor(-0.37, device=DEVICE))
    assert torch.equal(buffer, expected)


def test_compiled_whole():
    logits, token_ids, arguments = arguments_of(random_batch(LENGTHS, vocab_size=100))
    grads = []
    for call in (fused_policy_loss, torch.compile(fused_policy_loss, fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        call(leaf, token_ids, **arguments).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
