"""token_logprobs: log-probability and entropy of each token from its logits, both differentiable.

With x = logits / temperature and p = softmax(x):
    log_prob = x_y - logsumexp(x)            d log_prob / d logits = (onehot_y - p) / temperature
    entropy  = logsumexp(x) - sum_j p_j x_j  d entropy  / d logits = -p (log p + entropy) / temperature

With `kept`, the logits of all other tokens are -inf, and p is over the kept tokens (ops/kept_logits).

The backward uses two numbers of each row, log p_j = (logits_j - shift) / temperature - log_sum. logsumexp alone is not
enough: if the logits are far from 0, it would round away the digits of log_sum.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ...common.checks import always_looks, check_contents, check_float_matrix, check_token_ids, per_token_temperature
from ...common.library import Op, register
from ...common.records import schema, unpack
from ...sampling_mask import SamplingMask
from ..kept_logits.op import check_kept, kept_logits
from ..kept_logits.reference import kept_logits_reference
from .reference import token_logprobs_reference
from .rows import LogitRows, RowGradients

OP = Op(__package__)


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    kept: SamplingMask | None = ...,
    with_entropy: Literal[False] = ...,
    check: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    kept: SamplingMask | None = ...,
    with_entropy: Literal[True],
    check: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = ...,
    kept: SamplingMask | None = ...,
    with_entropy: bool,
    check: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    kept: SamplingMask | None = None,
    with_entropy: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at token_ids, and optionally the entropy; both float32, in nats.

    The forward reads the logits once. The backward reads them once and writes their gradient once.

    logits: [B, L, V] or [T, V]; float32, bfloat16 or float16; any outer strides, last dimension contiguous. A logit of
        -inf has probability 0. logits[t] scores token_ids[t]: the call shifts nothing.
    token_ids: [B, L] or [T], int32 or int64. An id of -100 gives 0 and no gradient. An id out of range raises
        ValueError on the CPU and gives NaN on a GPU. With check=True it raises on a GPU too.
    temperature: divides the logits. A number or one float per token, above 0.
    kept: the tokens that top-k, top-p or min-p kept at each position, recorded by the sampler. Log-probability and
        entropy are then over the kept tokens, and the gradient of all other logits is 0. It costs a copy of the
        logits. A token outside of its own set raises ValueError on the CPU and gives NaN on a GPU. With check=True it
        raises on a GPU too. A position whose kept logits are all -inf gives NaN.
    with_entropy: return the entropy too.
    check: on a GPU, raise for token_ids, temperature and kept too. The host then waits for the GPU.
    backend: "auto", "cpu", "triton" or "reference". "auto" follows the device of logits.
    Returns log_probs, or (log_probs, entropy), of token_ids' shape; float32, in nats, differentiable.
    Raises ValueError or TypeError that names the argument, and RuntimeError for a missing backend.
    """
    check_float_matrix("logits", logits)
    check_token_ids(token_ids, logits.shape[:-1], logits.device)
    temperature = per_token_temperature(temperature, token_ids.shape, logits.device)
    backend = OP.resolve(backend, logits.device)
    if check or always_looks(logits.device, backend):
        token_ids = check_contents(token_ids, logits.shape[-1], temperature)
    token_ids, *sets = check_kept(kept, token_ids, logits.shape[-1], check, backend)
    if backend == "reference":
        if kept is not None:
            logits = kept_logits_reference(logits, *sets)
        log_probs, entropy = token_logprobs_reference(logits, token_ids, temperature)
    else:
        rows = logits, token_ids.contiguous(), temperature.contiguous()
        log_probs, entropy = _TokenLogprobs.apply(*rows, *sets, with_entropy, backend)
    return (log_probs, entropy) if with_entropy else log_probs


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token_ids, temperature, kept_ids, kept_offsets, with_entropy, backend):
        if kept_ids is not None:
            # the gradient of a logit of -inf is exactly 0, so this gradient is the gradient of the original logits
            logits = kept_logits(logits, kept_ids, kept_offsets, backend)
        results = token_logprobs_forward(logits, token_ids, temperature, with_entropy, backend)
        log_probs, entropy, shift, log_sum = results
        ctx.save_for_backward(logits, token_ids, temperature, shift, log_sum, entropy)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        logits, token_ids, temperature, shift, log_sum, entropy = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 7
        grad_log_probs = torch.zeros_like(log_sum) if grad_log_probs is None else grad_log_probs.contiguous()
        if grad_entropy is not None:
            grad_entropy = grad_entropy.contiguous()
        gradients = shift, log_sum, entropy, grad_log_probs, grad_entropy
        return token_logprobs_backward(logits, token_ids, temperature, *gradients, ctx.backend), *(None,) * 6


_kernels = OP.kernels


def _forward(logits, token_ids, temperature, with_entropy, backend):
    return _kernels(backend).forward(LogitRows(logits, token_ids, temperature), with_entropy)


def _forward_fake(logits, token_ids, temperature, with_entropy, backend):
    log_probs = logits.new_empty(token_ids.shape, dtype=torch.float32)
    return (
        log_probs,
        log_probs.new_empty(token_ids.shape if with_entropy else (0,)),
        torch.empty_like(log_probs),
        torch.empty_like(log_probs),
    )


def _backward(*arguments):
    rows, gradients, backend = unpack(arguments, LogitRows, RowGradients)
    out = torch.empty_like(rows.logits, memory_format=torch.contiguous_format)
    _kernels(backend).backward(rows, gradients, out)
    return out


def _backward_fake(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_in_place(*arguments):
    rows, gradients, backend = unpack(arguments, LogitRows, RowGradients)
    torch.autograd.graph.increment_version(rows.logits)  # so that a backward that saved the logits raises
    _kernels(backend).backward(rows, gradients, rows.logits)


_BACKWARD_ARGUMENTS = f"{schema(LogitRows, RowGradients, skip=1)}, str backend"  # after the logits
token_logprobs_forward = register(
    f"token_logprobs({schema(LogitRows)}, bool with_entropy, str backend)"
    " -> (Tensor log_probs, Tensor entropy, Tensor shift, Tensor log_sum)",
    _forward,
    _forward_fake,
)
token_logprobs_backward = register(
    f"token_logprobs_backward(Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor", _backward, _backward_fake
)
token_logprobs_backward_in_place = register(
    f"token_logprobs_backward_(Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()",
    _backward_in_place,
    lambda *_: None,
)
