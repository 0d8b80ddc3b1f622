"""fused_linear_policy_loss on a GPU: the interpreter's checks, and checks that need hardware."""

from dataclasses import replace

import pytest
import torch
from dtypes import DTYPES
from gpu_waits import count_waits
from linear_head import random_head
from linear_loss_cases import OPTIONS, TOKENS, batch_of, call, check_against_equations, head_and_batch
from policy_batches import LENGTHS, PRESETS

from minirl_kernels import PolicyLossConfig, fused_linear_policy_loss

DEVICE = "cuda"


def on_gpu(head, batch, layout="packed"):
    """(hidden, weight, token_ids, other arguments) on the GPU; the first two require a gradient."""
    hidden, weight, token_ids, _ = head
    arguments = {
        name: values.to(DEVICE) if isinstance(values, torch.Tensor) else values
        for name, values in batch.arguments(layout).items()
    }
    hidden, token_ids = (batch.lay_out(values, layout).to(DEVICE) for values in (hidden, token_ids))
    return hidden.requires_grad_(), weight.to(DEVICE).requires_grad_(), token_ids, arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_values_and_gradients(options, dtype):
    options = dict(options)
    head = random_head(TOKENS, 40, 1025, dtype, with_bias=options.pop("with_bias", False))
    check_against_equations(head, batch_of(head, LENGTHS, **options), PolicyLossConfig(), "triton", DEVICE, **options)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("extra", [{}, {"kl_coef": 0.3, "entropy_coef": 0.07}, {"rollout_is": "sequence"}], ids=str)
def test_objectives(preset, extra):
    head, batch = head_and_batch(20, 130)
    check_against_equations(head, batch, PolicyLossConfig.preset(preset, **extra), "triton", DEVICE)


@pytest.mark.parametrize("config", [PolicyLossConfig(entropy_coef=0.05), PolicyLossConfig.gspo()], ids=["one", "two"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 4096, 16_384, 20_011, 40_000, 50_257, 151_936])
def test_rows_of_many_blocks(vocab_size, dtype, config):
    """16-bit gradients overwrite float32 logits, of which some are still to be read; in one sweep and in two phases."""
    options = {"logit_softcap": 4.0}
    head = random_head(48, 64, vocab_size, dtype, with_bias=True)
    batch = replace(batch_of(head, [20, 28], **options), loss_mask=torch.ones(48, dtype=torch.bool))
    check_against_equations(head, batch, config, "triton", DEVICE, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_and_responses_without_advantage(dtype, monkeypatch):
    from minirl_kernels.ops.linear_token_logprobs import triton

    monkeypatch.setattr(triton, "rows_per_tile", lambda *_: 128)
    head, batch = head_and_batch(64, 4097, dtype, lengths=[120, 90, 77, 150])
    batch = replace(batch, advantages=torch.tensor([0.0, 1.0, 0.0, -0.5]))
    check_against_equations(head, batch, PolicyLossConfig(), "triton", DEVICE)
    _, grads = call(head, batch, "triton", device=DEVICE)
    assert not grads[0][:120].any()


def test_the_same_bits_every_time():
    head, batch = head_and_batch(64, 50_257, torch.bfloat16, lengths=[100, 80, 120])
    (first, grads), (second, others) = (call(head, batch, "triton", device=DEVICE) for _ in range(2))
    assert all(map(torch.equal, (*first[2:], *grads), (*second[2:], *others)))


@pytest.mark.parametrize("factor", [1.0, -0.37])
def test_the_gpu_is_waited_for_once(factor):
    head, batch = head_and_batch(20, 130)
    hidden, weight, token_ids, arguments = on_gpu(head, batch)
    bias = torch.zeros(130, device=DEVICE, requires_grad=True)
    factor = torch.tensor(factor, device=DEVICE)

    def run():
        out = fused_linear_policy_loss(hidden, weight, token_ids, bias=bias, **arguments)
        return torch.autograd.grad(out.loss * factor, (hidden, weight, bias))

    assert count_waits(run) == 1


def test_the_logits_never_exist():
    from minirl_kernels.ops.linear_token_logprobs.triton import rows_per_tile

    tokens, hidden_size, vocab_size = 16_384, 64, 50_257
    lengths = [tokens // 4] * 4
    head = random_head(tokens, hidden_size, vocab_size, torch.bfloat16)
    hidden, weight, token_ids, _ = head
    arguments = {
        "old_log_probs": torch.full((tokens,), -10.0, device=DEVICE),
        "rollout_log_probs": torch.full((tokens,), -10.0, device=DEVICE),
        "advantages": torch.ones(4, device=DEVICE),
        "loss_mask": None,
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32),
    }
    hidden, weight, token_ids = hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), token_ids.cuda()
    fused_linear_policy_loss(hidden, weight, token_ids, **arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_linear_policy_loss(hidden, weight, token_ids, **arguments)
    peak = torch.cuda.max_memory_allocated() - before
    tile = 4 * rows_per_tile(tokens, weight) * (vocab_size + 16)
    # additional memory: d weight in float32, d hidden twice, a few numbers for each token
    assert peak < tile + 6 * weight.numel() + 8 * hidden.numel() + 2**20 * 8


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole(mode):
    """reduce-overhead makes CUDA graphs. The loss stays out of them, because the host waits in it."""
    head, batch = head_and_batch(20, 130)
    hidden, weight, token_ids, arguments = on_gpu(head, batch)
    grads = []
    for function in (fused_linear_policy_loss, torch.compile(fused_linear_policy_loss, fullgraph=True, mode=mode)):
        for _ in range(3):  # the second call records a graph
            out = function(hidden, weight, token_ids, **arguments)
            last = torch.autograd.grad(out.loss, (hidden, weight))
        grads.append(last)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_bound_of_the_tokens_saves_the_wait(layout):
    head, batch = head_and_batch(64, 4097)
    hidden, weight, token_ids, arguments = on_gpu(head, batch, layout)
    counted = int(batch.loss_mask.sum())

    def run(bound):
        out = fused_linear_policy_loss(hidden, weight, token_ids, max_loss_tokens=bound, **arguments)
        return out.loss, *torch.autograd.grad(out.loss, (hidden, weight))

    expected = run(None)
    for bound in (counted, counted + 3, token_ids.numel()):
        assert count_waits(lambda bound=bound: run(bound)) == 0
        for values, right in zip(run(bound), expected, strict=True):
            torch.testing.assert_close(values, right)
