"""linear_token_logprobs: log-probability and entropy of each token from hidden states; the logits never exist.

With u = hidden weight^T + bias, and x as token_logprobs has it:
    x = softcap(logit_scale * u) / temperature,    softcap(z) = c tanh(z / c)
The scale is folded into the two others: x = c' tanh(u / c') / temperature', each divided by logit_scale.

The backward makes the logits again, tile by tile, and needs four matmuls where keeping them would need three.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ...common.checks import (
    always_looks,
    check_contents,
    check_device,
    check_float_matrix,
    check_tensor,
    check_token_ids,
    per_token_temperature,
)
from ...common.library import Op, register
from ...common.memory import rounded
from ...sampling_mask import SamplingMask
from ..kept_logits.op import check_kept
from ..token_logprobs.op import token_logprobs
from . import tiles
from .reference import linear_logits
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
    """`token_logprobs` of the logits that a linear head would give, [T, V] of which never exist at once.

    hidden: [B, L, H] or [T, H]; float32, bfloat16 or float16. hidden[t] scores token_ids[t]: nothing is shifted.
    weight: [V, H], of the dtype of hidden (autocast casts both). bias: [V], floating point. Logits are float32, and
        so is the sum over tokens of the gradient of weight, rounded once at the end.
    token_ids: [B, L] or [T], int32 or int64; -100 gives 0 and no gradient, and its row is not computed. An id out of
        range raises ValueError on the CPU, gives NaN on the GPU, and raises there too with check=True.
    temperature: divides the logits; above 0, a number or one float per token. logit_scale: multiplies them, above 0.
    logit_softcap: c of c * tanh(logits / c), above 0, after the scale and before the temperature; None means none.
    process_group: weight (and bias) is this rank's shard of the vocabulary, [0, H] if it has none; shards are in the
        order of the ranks and of any sizes. hidden, token_ids and the incoming gradient are the same on all. The
        gradient of hidden is their sum.
    kept: that of `token_logprobs`, with ids of the whole vocabulary where weight is a shard of it.
    Returns log_probs, or (log_probs, entropy), of token_ids' shape, float32, nats, differentiable. On a GPU the host
    waits once in the forward and once in the backward, for the number of rows that count.
    Raises ValueError or TypeError that names the argument, RuntimeError for a backend that is missing.
    """
    head = prepare_head(hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, process_group, kept)
    backend = OP.resolve(backend, hidden.device)
    token_ids = head.check_contents(token_ids, check, backend)
    if backend == "reference":
        options = {"temperature": head.temperature, "kept": kept, "with_entropy": with_entropy}
        return token_logprobs(head.logits(), token_ids, **options, backend=backend)
    flat_ids, flat_temperature = token_ids.flatten().contiguous(), head.temperature.flatten().contiguous()
    log_probs, entropy = _LinearTokenLogprobs.apply(
        head.hidden.flatten(0, -2), head.weight, head.bias, flat_ids, flat_temperature, head.softcap, *head.sets,
        with_entropy, head.shard, backend
    )  # fmt: skip
    log_probs = log_probs.view(token_ids.shape)
    return (log_probs, entropy.view(token_ids.shape)) if with_entropy else log_probs


class Head(NamedTuple):
    """The arguments of the linear losses that stand for logits, checked, cast, and without logit_scale."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    temperature: Tensor
    softcap: float  # 0: none
    shard: Shard | None
    kept: SamplingMask | None

    @property
    def sets(self) -> tuple[Tensor | None, Tensor | None]:
        """(ids, offsets) of the kept tokens."""
        return (None, None) if self.kept is None else (self.kept.token_ids, self.kept.offsets)

    @property
    def vocab_size(self) -> int | Tensor:
        return self.shard.vocab_size if self.shard else self.weight.shape[0]

    def logits(self) -> Tensor:
        return linear_logits(self.hidden, self.weight, self.bias, self.softcap)

    def check_contents(self, token_ids: Tensor, check: bool, backend: str) -> Tensor:
        """token_ids, looked at with the temperature where the caller asked, and always on the CPU."""
        if self.shard and backend == "reference":
            raise ValueError(
                "process_group is given with backend='reference': it must be None, or the backend 'cpu' or 'triton'"
            )
        if check or always_looks(self.hidden.device, backend):
            token_ids = check_contents(token_ids, self.vocab_size, self.temperature)
        return check_kept(self.kept, token_ids, self.vocab_size, check, backend)[0]


def prepare_head(hidden, weight, token_ids, bias, temperature, logit_softcap, logit_scale, process_group, kept) -> Head:
    """Check the arguments that the linear losses share."""
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    check_float_matrix("hidden", hidden)
    check_float_matrix("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be [V, {hidden.shape[-1]}], H of hidden")
    if weight.shape[0] == 0 and process_group is None:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: its vocabulary must not be empty")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}: it must be that of hidden, {hidden.dtype}")
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_tensor("bias", bias)
        if not bias.is_floating_point():
            raise TypeError(f"bias has dtype {bias.dtype}: it must be a floating point tensor")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}: it must be [{weight.shape[0]}], V of weight")
        check_device("bias", bias, hidden.device)
    check_token_ids(token_ids, hidden.shape[:-1], hidden.device)
    temperature = per_token_temperature(temperature, token_ids.shape, hidden.device)
    _check_positive("logit_scale", logit_scale)
    if logit_softcap is not None:
        _check_positive("logit_softcap", logit_softcap)
    return Head(
        hidden,
        weight,
        bias,
        temperature if logit_scale == 1 else temperature / logit_scale,
        0.0 if logit_softcap is None else logit_softcap / logit_scale,
        None if process_group is None else Shard(process_group, weight.shape[0], hidden.device),
        kept,
    )


def _check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}: it must be a number")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}: it must be above 0 and finite")


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, token_ids, temperature, softcap, kept_ids, kept_offsets, with_entropy, shard, backend
    ):
        log_probs, entropy, shift, log_sum = linear_stats(
            hidden, weight, bias, token_ids, temperature, softcap, kept_ids, kept_offsets, with_entropy, shard, backend
        )
        ctx.save_for_backward(
            hidden, weight, bias, token_ids, temperature, kept_ids, kept_offsets, shift, log_sum, entropy
        )
        ctx.softcap, ctx.shard, ctx.backend = softcap, shard, backend
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, weight, bias, token_ids, temperature, *sets, shift, log_sum, entropy = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return (None,) * 11
        if grad_log_probs is None:
            grad_log_probs = torch.zeros_like(log_sum)
        grads = linear_gradients(
            hidden, weight, bias, token_ids, temperature, ctx.softcap, *sets, shift, log_sum, entropy,
            grad_log_probs, grad_entropy, ctx.needs_input_grad[:3], ctx.shard, ctx.backend
        )  # fmt: skip
        operands = (hidden, weight, bias)
        grads = (
            rounded(grad, operand.dtype) if needed else None
            for grad, operand, needed in zip(grads, operands, ctx.needs_input_grad[:3], strict=True)
        )
        return *grads, *(None,) * 8


def linear_stats(
    hidden, weight, bias, token_ids, temperature, softcap, kept_ids, kept_offsets, with_entropy, shard, backend
):
    """(log_probs, entropy or empty, shift, log_sum) of flat rows, over the whole vocabulary."""
    operands = (hidden, weight, None if bias is None else bias.float())
    if shard is not None and kept_ids is not None:
        kept_ids = kept_ids - shard.first
    options = (temperature, softcap, kept_ids, kept_offsets, with_entropy, backend)
    if shard is None:
        return linear_token_logprobs_forward(*operands, token_ids, *options)
    if shard.size:
        _, local_ids = shard.local_ids(token_ids)
        stats = linear_token_logprobs_forward(*operands, local_ids, *options)
    else:
        nothing, nowhere = torch.zeros_like(temperature), torch.full_like(temperature, -torch.inf)
        stats = nothing, nothing if with_entropy else nothing.new_empty(0), nowhere, nowhere
    return shard.combine(*stats, token_ids, temperature)


def linear_gradients(
    hidden, weight, bias, token_ids, temperature, softcap, kept_ids, kept_offsets, shift, log_sum, entropy,
    grad_log_probs, grad_entropy, needs, shard, backend
):  # fmt: skip
    """(d hidden, d weight, d bias): what linear_stats gave, and the gradients by log_probs and entropy."""
    if shard is not None and not shard.size:
        grad_hidden, *others = (grad.zero_() for grad in gradients_fake(hidden, weight, *needs))
        return shard.sum(grad_hidden) if needs[0] else grad_hidden, *others
    if shard is not None:
        token_ids = shard.ids_or_elsewhere(token_ids)
        kept_ids = None if kept_ids is None else kept_ids - shard.first
    grad_hidden, *others = linear_token_logprobs_backward(
        hidden,
        weight,
        None if bias is None else bias.float(),
        token_ids,
        temperature,
        softcap,
        kept_ids,
        kept_offsets,
        shift,
        log_sum,
        entropy,
        grad_log_probs.contiguous(),
        None if grad_entropy is None else grad_entropy.contiguous(),
        *needs,
        backend,
    )
    if shard is not None and needs[0]:
        grad_hidden = shard.sum(grad_hidden)
    return grad_hidden, *others


_kernels = OP.kernels


def _forward(*arguments):
    return tiles.forward(_kernels(arguments[-1]), *arguments[:-1])


def _forward_fake(hidden, weight, bias, token_ids, *arguments):
    with_entropy = arguments[-2]
    log_probs, shift, log_sum = (hidden.new_empty(token_ids.shape, dtype=torch.float32) for _ in range(3))
    return log_probs, log_probs.new_empty(token_ids.shape if with_entropy else (0,)), shift, log_sum


def _backward(*arguments):
    *tensors, needs_hidden, needs_weight, needs_bias, backend = arguments
    return tiles.backward(_kernels(backend), *tensors, (needs_hidden, needs_weight, needs_bias))


def gradients_fake(hidden, weight, needs_hidden, needs_weight, needs_bias):
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if needs_weight else 0, dtype=torch.float32),
        hidden.new_empty(weight.shape[0] if needs_bias else 0, dtype=torch.float32),
    )


HEAD_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor temperature, float softcap, "
    "Tensor? kept_ids, Tensor? kept_offsets"
)
NEEDS_ARGUMENTS = "bool needs_hidden, bool needs_weight, bool needs_bias"
GRADIENT_RESULTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
linear_token_logprobs_forward = register(
    f"linear_token_logprobs({HEAD_ARGUMENTS}, bool with_entropy, str backend)"
    " -> (Tensor log_probs, Tensor entropy, Tensor shift, Tensor log_sum)",
    _forward,
    _forward_fake,
    waits=True,
)
linear_token_logprobs_backward = register(
    f"linear_token_logprobs_backward({HEAD_ARGUMENTS}, Tensor shift, Tensor log_sum, Tensor entropy, "
    f"Tensor grad_log_probs, Tensor? grad_entropy, {NEEDS_ARGUMENTS}, str backend) -> ({GRADIENT_RESULTS})",
    _backward,
    lambda hidden, weight, *arguments: gradients_fake(hidden, weight, *arguments[-4:-1]),
    waits=True,
)
