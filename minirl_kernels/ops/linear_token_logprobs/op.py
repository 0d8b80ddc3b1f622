"""linear_token_logprobs: log-probability and entropy of each token from hidden states, without a [T, V] tensor.

With u = hidden weight^T + bias, and x = logits / temperature of token_logprobs:
    x = softcap(logit_scale * u) / temperature,    softcap(z) = c tanh(z / c)
The other two options absorb the scale: x = c' tanh(u / c') / temperature', where c' = c / logit_scale and
temperature' = temperature / logit_scale.

The backward makes the logits again, tile by tile. This costs four matmuls in all; with kept logits it would be three.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ...common.library import Op, register
from ...common.memory import rounded
from ...common.records import schema, unpack, with_values
from ...sampling_mask import SamplingMask
from ..token_logprobs.op import token_logprobs
from ..token_logprobs.rows import RowGradients
from . import tiles
from .head import HeadRows, Needs, prepare_head
from .sharded import Shard

OP = Op(__package__)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    logit_softcap: float | None = ...,
    logit_scale: float = ...,
    process_group: torch.distributed.ProcessGroup | None = ...,
    kept: SamplingMask | None = ...,
    with_entropy: Literal[False] = ...,
    check: bool = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    logit_softcap: float | None = ...,
    logit_scale: float = ...,
    process_group: torch.distributed.ProcessGroup | None = ...,
    kept: SamplingMask | None = ...,
    with_entropy: Literal[True],
    check: bool = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    logit_softcap: float | None = ...,
    logit_scale: float = ...,
    process_group: torch.distributed.ProcessGroup | None = ...,
    kept: SamplingMask | None = ...,
    with_entropy: bool,
    check: bool = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    kept: SamplingMask | None = None,
    with_entropy: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` from hidden states and a linear head, without a [T, V] tensor of logits.

    The logits are hidden weight^T + bias in float32. On a GPU the host waits once in the forward and once in the
    backward, for the number of rows that count.

    hidden: [B, L, H] or [T, H]; float32, bfloat16 or float16. hidden[t] scores token_ids[t]: the call shifts nothing.
    weight: [V, H], the dtype of hidden (autocast casts both). Its gradient is summed over tokens in float32, and
        rounded once at the end.
    token_ids: [B, L] or [T], int32 or int64. An id of -100 gives 0 and no gradient, and its row is not computed. An
        id out of range raises ValueError on the CPU and gives NaN on a GPU. With check=True it raises on a GPU too.
    bias: [V], floating point, or None.
    temperature: divides the logits. A number or one float per token, above 0.
    logit_softcap: c in c * tanh(logits / c), above 0. It applies after logit_scale and before temperature. None means
        no softcap.
    logit_scale: multiplies the logits; above 0.
    process_group: the ranks that share the vocabulary. weight and bias are then the shard of this rank: shards are in
        the order of the ranks and have any size, also [0, H]. hidden, token_ids and the incoming gradient must be
        equal on all ranks. Every rank gets the gradient of hidden summed over the ranks.
    kept: the tokens that the sampler kept, the same as in `token_logprobs`. The ids are ids of the whole vocabulary,
        also with process_group.
    with_entropy: return the entropy too.
    check: on a GPU, raise for token_ids, temperature and kept too. The host then waits for the GPU.
    backend: "auto", "cpu", "triton" or "reference". "auto" follows the device of hidden.
    Returns log_probs, or (log_probs, entropy), of token_ids' shape; float32, in nats, differentiable.
    Raises ValueError or TypeError that names the argument, and RuntimeError for a missing backend.
    """
    head = prepare_head(hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, process_group, kept)
    backend = OP.resolve(backend, hidden.device)
    token_ids = head.check_contents(token_ids, check, backend)
    if backend == "reference":
        options = {"temperature": head.temperature, "kept": kept, "with_entropy": with_entropy}
        return token_logprobs(head.logits(), token_ids, **options, backend=backend)
    log_probs, entropy = _LinearTokenLogprobs.apply(*head.rows(token_ids), with_entropy, head.shard, backend)
    log_probs = log_probs.view(token_ids.shape)
    return (log_probs, entropy.view(token_ids.shape)) if with_entropy else log_probs


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        head, with_entropy, shard, backend = unpack(arguments, HeadRows)
        log_probs, entropy, shift, log_sum = linear_stats(head, with_entropy, shard, backend)
        ctx.save_for_backward(*with_values(head, softcap=None), shift, log_sum, entropy)
        ctx.softcap, ctx.shard, ctx.backend = head.softcap, shard, backend
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        head, shift, log_sum, entropy = unpack(ctx.saved_tensors, HeadRows)
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 11
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_sum)
        needs = Needs(*ctx.needs_input_grad[:3])
        gradients = RowGradients(shift, log_sum, entropy, grad_log_probs, grad_entropy)
        grads = linear_gradients(with_values(head, softcap=ctx.softcap), gradients, needs, ctx.shard, ctx.backend)
        grads = (
            rounded(grad, operand.dtype) if needed else None
            for grad, operand, needed in zip(grads, head[:3], needs, strict=True)
        )
        return *grads, *(None,) * 8


def linear_stats(
    head: HeadRows, with_entropy: bool, shard: Shard | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy or empty, shift, log_sum) of the rows, over the whole vocabulary."""
    head = head.detached()
    if shard is None:
        return linear_token_logprobs_forward(*head, with_entropy, backend)
    if shard.size:
        _, local_ids = shard.local_ids(head.token_ids)
        local = with_values(head, token_ids=local_ids, kept_ids=shard.local_kept(head.kept_ids))
        stats = linear_token_logprobs_forward(*local, with_entropy, backend)
    else:
        zeros, minus_inf = torch.zeros_like(head.temperature), torch.full_like(head.temperature, -torch.inf)
        stats = zeros, zeros if with_entropy else zeros.new_empty(0), minus_inf, minus_inf
    return shard.combine(*stats, head.token_ids, head.temperature)


def linear_gradients(
    head: HeadRows, gradients: RowGradients, needs: Needs, shard: Shard | None, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight, d bias). A gradient that is not in `needs` is empty."""
    if shard is not None and not shard.size:
        grad_hidden, *others = (grad.zero_() for grad in gradients_fake(head.hidden, head.weight, *needs))
        return shard.sum(grad_hidden) if needs.needs_hidden else grad_hidden, *others
    head = head.detached()
    if shard is not None:
        local_ids = shard.ids_or_elsewhere(head.token_ids)
        head = with_values(head, token_ids=local_ids, kept_ids=shard.local_kept(head.kept_ids))
    incoming = (gradients.grad_log_probs, gradients.grad_entropy)
    grad_log_probs, grad_entropy = (None if grad is None else grad.contiguous() for grad in incoming)
    gradients = with_values(gradients, grad_log_probs=grad_log_probs, grad_entropy=grad_entropy)
    grad_hidden, *others = linear_token_logprobs_backward(*head, *gradients, *needs, backend)
    if shard is not None and needs.needs_hidden:
        grad_hidden = shard.sum(grad_hidden)
    return grad_hidden, *others


_kernels = OP.kernels


def _forward(*arguments):
    head, with_entropy, backend = unpack(arguments, HeadRows)
    return tiles.forward(_kernels(backend), head, with_entropy)


def _forward_fake(hidden, weight, bias, token_ids, *arguments):
    with_entropy = arguments[-2]
    log_probs, shift, log_sum = (hidden.new_empty(token_ids.shape, dtype=torch.float32) for _ in range(3))
    return log_probs, log_probs.new_empty(token_ids.shape if with_entropy else (0,)), shift, log_sum


def _backward(*arguments):
    head, gradients, needs, backend = unpack(arguments, HeadRows, RowGradients, Needs)
    return tiles.backward(_kernels(backend), head, gradients, needs)


def gradients_fake(hidden, weight, needs_hidden, needs_weight, needs_bias):
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32),
        hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32),
    )


GRADIENT_RESULTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
linear_token_logprobs_forward = register(
    f"linear_token_logprobs({schema(HeadRows)}, bool with_entropy, str backend)"
    " -> (Tensor log_probs, Tensor entropy, Tensor shift, Tensor log_sum)",
    _forward,
    _forward_fake,
    waits=True,
)
linear_token_logprobs_backward = register(
    f"linear_token_logprobs_backward({schema(HeadRows, RowGradients, Needs)}, str backend) -> ({GRADIENT_RESULTS})",
    _backward,
    lambda hidden, weight, *arguments: gradients_fake(hidden, weight, *arguments[-4:-1]),
    waits=True,
)
