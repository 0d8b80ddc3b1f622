"""policy_loss by the kernels over tokens on a GPU, and the losses in a CUDA graph."""

from functools import partial

import pytest
import torch
from cuda_graphs import captured
from dtypes import DTYPES
from gpu_waits import count_waits
from policy_batches import LENGTHS, PRESETS, random_batch

from minirl_kernels import PolicyLossConfig, PolicyLossInputs, fused_policy_loss, policy_loss

DEVICE = "cuda"
LONG = [1500, 0, 1024, 3, 2100]


def to(device, arguments):
    return {
        name: values.to(device) if isinstance(values, torch.Tensor) else values for name, values in arguments.items()
    }


def run(batch, layout, device, config, dtype=torch.float32):
    """(loss, per-token results, gradients, metrics) on the CPU."""
    leaves = [batch.lay_out(values, layout).to(device, dtype) for values in (batch.log_probs, batch.entropy)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = policy_loss(leaves[0], entropy=leaves[1], config=config, **to(device, batch.arguments(layout)))
    grads = torch.autograd.grad(2 * out.loss, leaves)
    tensors = (out.loss.detach(), out.log_probs, out.entropy, out.token_loss, out.token_grad, *grads)
    return [values.cpu() for values in tensors], out.metrics.compute()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_values_of_the_cpu(preset, lengths, layout):
    """The CPU computes the same numbers in float64 and rounds them once."""
    batch = random_batch(lengths, spread=0.05)
    for mode in ("seq-mean-token-mean", "token-mean", "group-token-mean"):
        config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01, loss_agg_mode=mode)
        (ours, metrics), (expected, others) = (run(batch, layout, device, config) for device in (DEVICE, "cpu"))
        for values, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(values, right, rtol=1e-5, atol=1e-7)
        assert metrics == pytest.approx(others, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    batch = random_batch(LENGTHS)
    config = PolicyLossConfig(entropy_coef=0.01)
    (ours, _), (expected, _) = (run(batch, "packed", device, config, dtype) for device in (DEVICE, "cpu"))
    for values, right in zip(ours, expected, strict=True):
        assert values.dtype == right.dtype
        torch.testing.assert_close(values, right)


def calls_on_gpu(layout, config):
    """(call(new values) of each loss, the tensor that it reads, tensors of other values)."""
    batch = random_batch(LENGTHS, vocab_size=50)
    logits, token_ids = (batch.lay_out(values, layout).to(DEVICE) for values in (batch.logits, batch.token_ids))
    arguments = to(DEVICE, batch.arguments(layout))
    inputs = PolicyLossInputs.prepare(token_ids, config=config, **arguments)

    def of(call, **options):
        def run(values):
            leaf = values.detach().requires_grad_()
            out = call(leaf, **options)
            return out.loss, torch.autograd.grad(out.loss, leaf)[0], out.metrics.sums, out.metrics.maxima

        return run

    log_probs = -torch.rand(token_ids.shape, device=DEVICE)
    yield of(policy_loss, config=config, **arguments), log_probs
    yield of(fused_policy_loss, token_ids=token_ids, config=config, **arguments), logits.nan_to_num()
    yield of(fused_policy_loss, token_ids=token_ids, inputs=inputs), logits.nan_to_num()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("preset", ["minirl", "cispo", "gspo"])
def test_captured_in_a_cuda_graph(preset, layout):
    for call, values in calls_on_gpu(layout, PolicyLossConfig.preset(preset)):
        static = values.clone()
        graph, results = captured(partial(call, static))
        for factor in (0.5, 1.5):
            static.copy_(values * factor)
            graph.replay()
            assert all(map(torch.equal, results, call(values * factor)))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_waits_for_the_gpu(preset, layout):
    for call, values in calls_on_gpu(layout, PolicyLossConfig.preset(preset)):
        assert count_waits(lambda call=call, values=values: call(values)) == 0


def test_a_sum_over_a_response_does_not_depend_on_its_place():
    batch = random_batch([1500, 700, 2100])
    config = PolicyLossConfig(clip=False)
    of_last = torch.arange(4300) >= 2200
    losses = []
    for part, mask in ((batch, of_last), (batch.responses(2, 3), of_last[2200:])):
        arguments = to(DEVICE, {**part.arguments("packed"), "loss_mask": mask})
        out = policy_loss(part.log_probs.to(DEVICE), config=config, num_responses=3, **arguments)
        losses.append(out)
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert torch.equal(losses[0].metrics.maxima, losses[1].metrics.maxima)
