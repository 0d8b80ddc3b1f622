"""Checks the rollouts of an engine against the request, before training uses them."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import MiniRLError
from .interface import FinishReason, Rollouts

# nats: a log-probability may exceed 0 by this much, from the rounding of a log-softmax
ROUNDING = 1e-4


@dataclass(frozen=True)
class PolicyLimits:
    """The limits of valid responses of a policy.

    vocab_size: the model's vocabulary size. end_token_ids: tokens that end a response.
    max_new_tokens: maximum number of tokens in a response.
    routing: (MoE layers, experts per token, experts) if the engine must record its experts, otherwise None.
    """

    vocab_size: int
    end_token_ids: frozenset[int]
    max_new_tokens: int
    routing: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Asked:
    """The request to an engine: n responses to each prompt. names: of the prompts, for messages."""

    prompts: Sequence[Sequence[int]]
    names: Sequence[str]
    n: int

    def row(self, index: int) -> str:
        """The name of the response in a row, for messages."""
        return f"response {index % self.n} to prompt {index // self.n}, {self.names[index // self.n]}"


def check_rollouts(rollouts: Rollouts, asked: Asked, limits: PolicyLimits) -> None:
    """Raises MiniRLError for invalid rollouts. The message names the response, its prompt and the token, from 0.

    Checks:
        the number of responses, and every shape and dtype of `Rollouts`;
        masks that match the prompts and responses;
        1 to max_new_tokens tokens of the vocabulary, and a known finish reason, for each response;
        log-probabilities that are finite and not above 0;
        experts that match the policy's routers.
    """
    _check_shapes(rollouts, len(asked.prompts) * asked.n)
    _check_layout(rollouts, asked)
    _check_tokens(rollouts, asked, limits)
    _check_log_probs(rollouts, asked)
    _check_routing(rollouts, asked, limits)


def _check_shapes(rollouts: Rollouts, size: int) -> None:
    if rollouts.token_ids.dim() != 2:
        raise _wrong(f"token_ids has shape {tuple(rollouts.token_ids.shape)}: it must be [responses, tokens]")
    shape = (size, rollouts.token_ids.shape[1])
    for name, dtype, expected in (
        ("token_ids", torch.int64, shape),
        ("attention_mask", torch.bool, shape),
        ("response_mask", torch.bool, shape),
        ("rollout_log_probs", torch.float32, shape),
        ("group_ids", torch.int64, shape[:1]),
    ):
        values = getattr(rollouts, name)
        if tuple(values.shape) != expected:
            raise _wrong(f"{name} has shape {tuple(values.shape)}: it must be {expected}, for {size} responses")
        if values.dtype != dtype or values.device.type != "cpu":
            raise _wrong(f"{name} is {values.dtype} on {values.device}: it must be {dtype} on the CPU")
    if len(rollouts.finish_reasons) != size:
        raise _wrong(f"finish_reasons has {len(rollouts.finish_reasons)} values: it must have {size}")


def _check_layout(rollouts: Rollouts, asked: Asked) -> None:
    """Check prompt, response and padding of each row."""
    rows, width = rollouts.token_ids.shape
    groups = torch.arange(rows) // asked.n
    if place := _first(rollouts.group_ids != groups):
        (row,) = place
        raise _wrong(f"{asked.row(row)}: group_ids is {int(rollouts.group_ids[row])}: it must be {int(groups[row])}")
    starts = torch.tensor([len(prompt) for prompt in asked.prompts])[groups]
    lengths = rollouts.attention_mask.sum(1)
    if place := _first(lengths <= starts):
        (row,) = place
        raise _wrong(
            f"{asked.row(row)}: attention_mask has {int(lengths[row])} tokens, {int(starts[row])} of the prompt: "
            "a response must have at least one token, which may be the end-of-sequence token"
        )
    places = torch.arange(width)
    is_token = places < lengths[:, None]
    for name, expected in (
        ("attention_mask", is_token),
        ("response_mask", is_token & (places >= starts[:, None])),
    ):
        if place := _first(getattr(rollouts, name) != expected):
            row, token = place
            raise _wrong(
                f"{asked.row(row)}: {name} is {not expected[place]} at token {token}: it must be the opposite, "
                f"with {int(starts[row])} tokens of the prompt, {int(lengths[row])} in all, and padding on the right"
            )
    prompts = pad_sequence([torch.tensor(list(prompt)) for prompt in asked.prompts], batch_first=True)[groups]
    longest = prompts.shape[1]
    if place := _first((rollouts.token_ids[:, :longest] != prompts) & (places[:longest] < starts[:, None])):
        row, token = place
        raise _wrong(
            f"{asked.row(row)}: token {token} is {int(rollouts.token_ids[place])}: it must be {int(prompts[place])}, "
            "the prompt's"
        )


def _check_tokens(rollouts: Rollouts, asked: Asked, limits: PolicyLimits) -> None:
    ids = rollouts.token_ids
    if place := _first((ids < 0) | (ids >= limits.vocab_size)):
        row, token = place
        raise _wrong(
            f"{asked.row(row)}: token {token} is {int(ids[place])}: it must be in [0, {limits.vocab_size}), as the "
            "model's vocabulary"
        )
    lengths = rollouts.response_mask.sum(1)
    if place := _first(lengths > limits.max_new_tokens):
        (row,) = place
        raise _wrong(
            f"{asked.row(row)}: it has {int(lengths[row])} tokens: it must have at most {limits.max_new_tokens}, "
            "rollout.max_new_tokens"
        )
    last = ids.gather(1, rollouts.attention_mask.sum(1, keepdim=True) - 1)[:, 0].tolist()
    for row, (reason, token) in enumerate(zip(rollouts.finish_reasons, last, strict=True)):
        if reason not in typing.get_args(FinishReason):
            raise _wrong(f"{asked.row(row)}: its finish reason is {reason!r}: it must be 'stop' or 'length'")
        if reason == "stop" and token not in limits.end_token_ids:
            raise _wrong(
                f"{asked.row(row)}: its finish reason is 'stop', and its last token is {token}: the last token must be "
                f"the one that ended it, of {sorted(limits.end_token_ids)}"
            )


def _check_log_probs(rollouts: Rollouts, asked: Asked) -> None:
    values, mask = rollouts.rollout_log_probs, rollouts.response_mask
    possible = values.isfinite() & (values <= ROUNDING)
    if place := _first(mask & ~possible):
        row, token = place
        raise _wrong(
            f"{asked.row(row)}: rollout_log_probs is {float(values[place])} at token {token}, token "
            f"{int(mask[row, :token].sum())} of the response: it must be finite and at most 0"
        )
    if place := _first(~mask & (values != 0)):
        row, token = place
        raise _wrong(
            f"{asked.row(row)}: rollout_log_probs is {float(values[place])} at token {token}: it must be 0 where no "
            "token was sampled"
        )


def _check_routing(rollouts: Rollouts, asked: Asked, limits: PolicyLimits) -> None:
    if limits.routing is None:
        return
    routed = rollouts.routed_experts
    if routed is None:
        raise _wrong("it has no routed_experts: routing_replay needs them")
    layers, top_k, num_experts = limits.routing
    expected = (*rollouts.token_ids.shape, layers, top_k)
    if tuple(routed.experts.shape) != expected:
        raise _wrong(
            f"routed_experts has shape {tuple(routed.experts.shape)}: it must be {expected}, for {layers} MoE layers "
            f"of {top_k} experts per token"
        )
    if routed.num_experts != num_experts:
        raise _wrong(f"routed_experts is of {routed.num_experts} experts: it must be of {num_experts}, as the model is")
    if place := _first((routed.experts.int() >= num_experts).any(-1) & routed.valid):
        row, token, layer = place
        raise _wrong(
            f"{asked.row(row)}: routed_experts is {routed.experts[place].tolist()} at token {token}, MoE layer {layer}"
            f": experts must be in [0, {num_experts})"
        )


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """The index of the first True; None if there is none."""
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None


def _wrong(message: str) -> MiniRLError:
    return MiniRLError(f"the rollout engine's answer cannot be used: {message}")
