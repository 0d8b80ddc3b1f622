"""Checks of the Triton kernels against float64, for the interpreter and a GPU; results are as exact as eager's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import equations
import pytest
import torch
from policy_batches import assert_as_exact_as_eager, per_row

from minirl_kernels import fused_policy_loss, log_softmax, mean, softmax, token_logprobs
from minirl_kernels import sum as mk_sum
from minirl_kernels.ops.softmax.reference import softmax_reference
from minirl_kernels.ops.token_logprobs.reference import token_logprobs_reference

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.runtime import interpreter
from verify import quick_interpreter


def interpreter_only():
    """A mark for tests that only make sense in Triton's interpreter."""
    return pytest.mark.skipif(
        not triton.knobs.runtime.interpret, reason="Triton compiles in this process; tests/gpu runs on the GPU"
    )


quick_interpreter.install()

# The search for integer overflow takes a third of the interpreter's time; the checks in tests/verify do it.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


def random_logits(*shape, dtype=torch.float32, seed=0, spread=2.0):
    return (spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def random_ids(logits, seed=0, dtype=torch.int64):
    """Ids in range, of which every fourth is ignored."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator, dtype=dtype)
    token_ids.view(-1)[1::4] = -100
    return token_ids


def check_token_logprobs(logits, token_ids, temperature=1.0, *, with_entropy=True, device="cpu"):
    """Values, and the gradient under random upstream gradients, are as exact as the reference against float64."""
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(token_ids.shape, generator=generator) for _ in range(1 + with_entropy)]

    def run(backend):
        leaf = _on(logits, device).requires_grad_()
        temp = temperature.to(device) if isinstance(temperature, torch.Tensor) else temperature
        out = token_logprobs(leaf, token_ids.to(device), temperature=temp, with_entropy=with_entropy, backend=backend)
        out = out if with_entropy else (out,)
        (grad,) = torch.autograd.grad(out, leaf, [values.to(device) for values in upstream])
        return [values.detach().cpu() for values in (*out, grad)]

    leaf = logits.detach().double().requires_grad_()
    temp = torch.as_tensor(temperature, dtype=torch.float32).double().expand(token_ids.shape)
    out = token_logprobs_reference(leaf, token_ids, temp)[: 1 + with_entropy]
    (grad,) = torch.autograd.grad(out, leaf, [values.double() for values in upstream])
    *ours, our_grad = run("triton")
    *eager, eager_grad = run("reference")
    for values, theirs, exact in zip(ours, eager, out, strict=True):
        assert_as_exact_as_eager(values, theirs, exact.detach())
    assert_as_exact_as_eager(our_grad, eager_grad, grad, per_row(grad))


def compare(reference_in, call, leaves, upstream, scales, device):
    """Compare call(*leaves, backend=...) and its gradients by Triton with reference_in(*leaves) in float64.

    scales(exact results) returns the scale of the errors for each result.
    """

    def run(backend):
        ours = [_on(leaf, device).requires_grad_() for leaf in leaves]
        out = call(*ours, backend=backend)
        grads = torch.autograd.grad(out, ours, upstream.to(device, out.dtype))
        return [values.detach().cpu() for values in (out, *grads)]

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = reference_in(*wide)
    exact = [values.detach() for values in (out, *torch.autograd.grad(out, wide, upstream.double()))]
    for ours, eager, truth, scale in zip(run("triton"), run("reference"), exact, scales(exact), strict=True):
        assert_as_exact_as_eager(ours, eager, truth, scale)


def check_softmax(x, log, dim=-1, *, device="cpu"):
    """Values and gradient along `dim`.

    The gradient of 16-bit values is computed from the rounded result, unlike the reference's. So only float32 gradients
    are compared with the reference.
    """
    call = log_softmax if log else softmax
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    if x.dtype == torch.float32:

        def scales(exact):
            terms = upstream.double() if log else exact[0] * upstream.double()
            return exact[0].abs().amax(dim, True), terms.abs().amax(dim, True)

        compare(
            lambda x: softmax_reference(x, dim, log),
            lambda x, backend: call(x, dim, backend=backend),
            [x],
            upstream,
            scales,
            device,
        )
        return
    exact = softmax_reference(x.double(), dim, log)
    leaf = _on(x, device).requires_grad_()
    out = call(leaf, dim, backend="triton")
    (grad,) = torch.autograd.grad(out, leaf, upstream.to(device, x.dtype))
    out, g = out.detach().cpu(), upstream.to(x.dtype).double()
    assert_as_exact_as_eager(out, softmax_reference(x, dim, log), exact, exact.abs().amax(dim, True))
    y = out.double()
    expected = g - y.exp() * g.sum(dim, True) if log else y * (g - (y * g).sum(dim, True))
    torch.testing.assert_close(grad.cpu(), expected.to(x.dtype))


def check_mean(x, dim, divide, *, device="cpu"):
    out = x.double().abs().sum(dim)
    terms = out / (x.numel() / out.numel() if divide else 1)
    compare(
        lambda x: (torch.mean if divide else torch.sum)(x, dim),
        lambda x, backend: (mean if divide else mk_sum)(x, dim, backend=backend),
        [x],
        torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype),
        lambda exact: (terms, None),
        device,
    )


class Results(NamedTuple):
    """Results of fused_policy_loss: all are per token [T] except the loss."""

    loss: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    token_grad: torch.Tensor
    grad: torch.Tensor
    token_loss: torch.Tensor

    def compared(self):
        """All results except token_loss; the equations sum it over each response."""
        return self[:-1]


def check_fused_policy_loss(batch, config, *, layout="packed", overwrite=False, device="cpu"):
    """Loss, per-token results and the gradient of the logits against the equations in float64."""
    token_ids = batch.token_ids.masked_fill(~batch.loss_mask, -100)
    arguments = {
        name: values.to(device) if isinstance(values, torch.Tensor) else values
        for name, values in batch.arguments(layout).items()
    }

    def run(backend):
        leaf = batch.lay_out(batch.logits, layout).to(device, copy=True).requires_grad_()
        # autograd forbids to overwrite a leaf that requires a gradient
        logits = leaf * 1 if overwrite and backend == "triton" else leaf
        out = fused_policy_loss(
            logits,
            batch.lay_out(batch.token_ids, layout).to(device),
            config=config,
            overwrite_logits=overwrite and backend == "triton",
            backend=backend,
            **arguments,
        )
        (2 * out.loss).backward()
        per_token = (out.log_probs, out.entropy, out.token_grad, leaf.grad / 2, out.token_loss)
        return Results(out.loss.detach().cpu(), *(batch.pack(values.detach().cpu(), layout) for values in per_token))

    def by_equations(dtype):
        leaf = batch.logits.to(dtype).requires_grad_()
        log_probs, entropy = equations.token_log_probs(leaf, token_ids)
        return equations.policy_loss_and_gradients((log_probs, leaf), log_probs, entropy, batch, config)

    exact = by_equations(torch.float64)
    ours, eager = run("triton"), run("reference")
    # the loss is a sum whose terms cancel, but their rounding errors do not
    scales = (ours.token_loss.abs().sum(), None, None, None, per_row(exact[-1]))
    for values, theirs, truth, scale in zip(ours.compared(), eager.compared(), exact, scales, strict=True):
        assert_as_exact_as_eager(values, theirs, truth, scale)
    torch.testing.assert_close(ours.token_loss.double().sum().float(), ours.loss, rtol=1e-5, atol=1e-6)
    return ours


def variants(config):
    """A preset with and without clipping, each with every KL estimator and none; half have an entropy bonus."""
    choices = itertools.product((True, False), (None, "k1", "k2", "k3"))
    for number, (clip, kl) in enumerate(choices):
        if clip and config.objective == "reinforce":
            continue
        penalty = {} if kl is None else {"kl_coef": 0.1, "kl_estimator": kl}
        yield replace(config, clip=clip, entropy_coef=0.05 * (number % 2), **penalty)


def _on(logits, device):
    """A copy on the device with the same strides."""
    storage = logits.as_strided((_extent(logits),), (1,), logits.storage_offset()).to(device, copy=True)
    return storage.as_strided(logits.shape, logits.stride())


def _extent(tensor):
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
