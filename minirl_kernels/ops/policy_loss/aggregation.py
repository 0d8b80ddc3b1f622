"""Aggregation of the token losses to one number: the weight of each token, made before the token losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import check_device, check_integers, check_like
from ...common.library import register_check
from ...config import PolicyLossConfig
from .layout import Packed, Padded

# the count of the mini-batch that the weights divide by
COUNT_OF_MODE = {
    "seq-mean-token-sum": "num_responses",
    "seq-mean-token-mean": "num_responses",
    "seq-mean-token-sum-norm": "num_responses",
    "token-mean": "num_tokens",
    "group-token-mean": "num_groups",
}


def token_weights(
    mask: Tensor,
    layout: Padded | Packed,
    config: PolicyLossConfig,
    *,
    num_responses=None,
    num_tokens=None,
    num_groups=None,
    group_ids: Tensor | None = None,
    raises: bool,
) -> Tensor:
    """The weight of each token: loss = sum of weights * token losses. Shape of mask, float32, 0 outside the mask.

    num_responses, num_tokens, num_groups: counts of the whole mini-batch. None means the count of this call.
    raises: check the value of a tensor count, and raise ValueError. Otherwise a count that is not above 0 and finite
        makes the weights NaN.
    """
    tokens_here = layout.response_sum(mask.float())
    mode = config.loss_agg_mode
    name = COUNT_OF_MODE[mode]
    given = {"num_responses": num_responses, "num_tokens": num_tokens, "num_groups": num_groups}[name]
    if mode == "token-mean":
        denominator = _count(name, given, tokens_here.sum().clamp(min=1), mask, raises)
    elif mode == "group-token-mean":
        check_groups(group_ids, layout.num_responses, mask.device)
        tokens, groups = _tokens_and_groups(tokens_here, group_ids)
        denominator = layout.to_tokens(tokens * _count(name, given, groups, mask, raises))
    else:
        denominator = _count(name, given, max(layout.num_responses, 1), mask, raises)
    weights = mask.float() / denominator
    if mode == "seq-mean-token-mean":
        weights = weights / layout.to_tokens(tokens_here.clamp(min=1))
    if mode == "seq-mean-token-sum-norm":
        weights = weights / config.loss_scale_factor
    return torch.where(mask, weights, 0.0)  # a tensor count may be 0 if there are no tokens: 0 / 0 is NaN


def check_groups(group_ids: Tensor | None, num_responses: int, device: torch.device) -> None:
    if group_ids is None:
        raise ValueError("group_ids is None with loss_agg_mode='group-token-mean': it must be [B] group numbers")
    check_integers("group_ids", group_ids)
    check_like("group_ids", group_ids, torch.Size((num_responses,)), device)


def _tokens_and_groups(tokens_here: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(number of tokens in the group of each response, [B], at least 1; number of groups in this call)."""
    same_group = (group_ids[:, None] == group_ids[None, :]).float()
    groups_here = same_group.sum(1).reciprocal().sum().round()  # the members of a group sum to 1
    # a sum and not a matmul, because autocast would round the counts
    return (same_group * tokens_here).sum(1).clamp(min=1), groups_here


def _count(name: str, given, default, mask: Tensor, raises: bool):
    """The caller's count of the whole mini-batch, or the default, which is the count of this call."""
    if given is None:
        return default
    check_count(name, given, mask.device)
    if isinstance(given, Tensor):
        count = given.detach().float().reshape(())
        return _checked_count(count, mask, name) if raises else torch.where(_is_valid(count), count, torch.nan)
    return given


def check_count(name: str, given, device: torch.device) -> None:
    """Check the caller's count of the whole mini-batch, but not the value of a tensor."""
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(given.shape)}: it must be a number, or a tensor of one")
        check_device(name, given, device)
        return
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name} is {given!r}: it must be a number, or a tensor of one")
    if not 0 < given < float("inf"):
        raise ValueError(f"{name} is {given}: it must be above 0 and finite")


def _is_valid(count: Tensor) -> Tensor:
    return (count > 0) & count.isfinite()


def _check_count(count, mask, name):
    if bool(mask.any()) and not bool(_is_valid(count)):
        raise ValueError(f"{name} is {count.item()}: it must be above 0 and finite where a token is in the loss")


_checked_count = register_check("checked_count(Tensor count, Tensor mask, str name) -> Tensor", _check_count)
