"""The kernels that a call of a loss launches on a GPU, forward and backward, and its waits."""

import pytest
import torch
import triton_cases
from kernel_counts import kernels, waits
from own_objectives import EXAMPLES
from policy_batches import LENGTHS, TOKEN_LEVEL, random_batch

from minirl_kernels import (
    Correction,
    PolicyLossConfig,
    PolicyLossInputs,
    fused_linear_policy_loss,
    fused_policy_loss,
    policy_loss,
)
from minirl_kernels.objectives import DPPO
from minirl_kernels.ops.policy_loss import op

pytestmark = triton_cases.interpreter_only()

LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])
MOST = 12
# of a tile: logits, loss and d logits, d hidden, its copy, d weight
OF_A_TILE = ("aten::addmm", "aten::mm", "fused_policy_loss_kernel", "aten::copy_")


def batch_in(layout):
    """(logits, token_ids, arguments)."""
    batch = random_batch(LENGTHS, vocab_size=17)
    logits, token_ids = (batch.lay_out(values, layout) for values in (batch.logits, batch.token_ids))
    return logits.nan_to_num(0.0), token_ids, batch.arguments(layout)


def of_call(call, *leaves, **options):
    """The call and its backward, as an optimizer that sets gradients to None runs them."""

    def run():
        for leaf in leaves:
            leaf.grad = None
        call(*leaves, **options).loss.backward()

    run()
    return run


@LAYOUTS
@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_fused_policy_loss(preset, layout):
    logits, token_ids, arguments = batch_in(layout)
    leaf = logits.requires_grad_()

    def call(logits, **options):
        return fused_policy_loss(logits, token_ids, backend="triton", **options)

    for mode in ("seq-mean-token-sum", "token-mean", "group-token-mean"):
        config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01, loss_agg_mode=mode)
        assert len(kernels(of_call(call, leaf, config=config, **arguments))) <= MOST
        inputs = PolicyLossInputs.prepare(token_ids, config=config, **arguments)
        assert len(kernels(of_call(call, leaf, inputs=inputs))) <= MOST - 3


@LAYOUTS
@pytest.mark.parametrize("preset", TOKEN_LEVEL)
def test_policy_loss(preset, layout, monkeypatch):
    monkeypatch.setattr(op, "backend_of", lambda device: "triton")
    logits, _, arguments = batch_in(layout)
    leaves = [torch.rand(logits.shape[:-1]).neg().requires_grad_(), torch.rand(logits.shape[:-1]).requires_grad_()]

    def call(log_probs, entropy, **options):
        return policy_loss(log_probs, entropy=entropy, **options)

    for mode in ("seq-mean-token-sum", "token-mean", "group-token-mean"):
        config = PolicyLossConfig.preset(preset, kl_coef=0.1, entropy_coef=0.01, loss_agg_mode=mode)
        assert len(kernels(of_call(call, *leaves, config=config, **arguments))) <= MOST


MOST_OF_ALL = Correction(level="sequence", upper=1.5, beyond="mask_response", normalise=True)


@pytest.mark.parametrize("objective", ["minirl", "gspo", "sequence_is", *EXAMPLES.values()], ids=str)
def test_values_of_whole_responses(objective, monkeypatch):
    """Packed, with a mean over groups, a KL and an entropy term, and a normalised correction: the most kernels."""
    monkeypatch.setattr(op, "backend_of", lambda device: "triton")
    logits, token_ids, arguments = batch_in("packed")
    correction = "token" if isinstance(objective, DPPO) else MOST_OF_ALL
    config = PolicyLossConfig.preset(
        objective,
        kl_coef=0.1,
        entropy_coef=0.01,
        loss_agg_mode="group-token-mean",
        rollout_is=correction,
        rollout_is_threshold=None,
    )

    def fused(logits):
        return fused_policy_loss(logits, token_ids, backend="triton", config=config, **arguments)

    def of_log_probs(log_probs, entropy):
        return policy_loss(log_probs, entropy=entropy, config=config, **arguments)

    assert len(kernels(of_call(fused, logits.requires_grad_()))) <= MOST
    leaves = [torch.rand(token_ids.shape).neg().requires_grad_(), torch.rand(token_ids.shape).requires_grad_()]
    assert len(kernels(of_call(of_log_probs, *leaves))) <= MOST


@LAYOUTS
def test_fused_linear_policy_loss(layout):
    """Beside the kernels of its tile, of which there is one."""
    logits, token_ids, arguments = batch_in(layout)
    leaves = [logits.requires_grad_(), torch.eye(17).requires_grad_()]

    def call(hidden, weight, **options):
        return fused_linear_policy_loss(hidden, weight, token_ids, backend="triton", **arguments, **options)

    launched = kernels(of_call(call, *leaves, max_loss_tokens=token_ids.numel()))
    of_tile = [name for name in launched if name in OF_A_TILE]
    assert len(of_tile) == 5
    assert len(launched) - len(of_tile) <= MOST


def test_a_bound_of_the_tokens_saves_the_wait():
    logits, token_ids, arguments = batch_in("padded")
    leaves = [logits.requires_grad_(), torch.eye(17).requires_grad_()]
    counted = int(arguments["loss_mask"].sum())

    def call(hidden, weight, **options):
        return fused_linear_policy_loss(hidden, weight, token_ids, backend="triton", **arguments, **options)

    assert "tolist" in waits(of_call(call, *leaves))
    expected = call(*leaves)
    expected_grads = torch.autograd.grad(expected.loss, leaves)
    for bound in (counted, counted + 3, token_ids.numel(), 1000):
        assert "tolist" not in waits(of_call(call, *leaves, max_loss_tokens=bound))
        out = call(*leaves, max_loss_tokens=bound)
        assert torch.equal(out.loss, expected.loss)
        assert all(map(torch.equal, out[2:], expected[2:]))
        for grad, other in zip(torch.autograd.grad(out.loss, leaves), expected_grads, strict=True):
            torch.testing.assert_close(grad, other)
    with pytest.raises(ValueError, match=f"max_loss_tokens is {counted - 1}: it must be at least the number of tokens"):
        call(*leaves, max_loss_tokens=counted - 1)


@pytest.mark.parametrize(("bound", "error"), [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bounds_that_are_no_numbers(bound, error):
    logits, token_ids, arguments = batch_in("padded")
    with pytest.raises(error, match=f"max_loss_tokens is {bound}: it must be"):
        fused_linear_policy_loss(logits, torch.eye(17), token_ids, max_loss_tokens=bound, **arguments)
