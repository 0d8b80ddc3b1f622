"""How per-token losses become one number: each token's weight in it, known before any loss is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_device, check_integers, check_like
from ...config import PolicyLossConfig
from .layout import Packed, Padded


def token_weights(
    mask: Tensor,
    layout: Padded | Packed,
    config: PolicyLossConfig,
    *,
    num_responses=None,
    num_tokens=None,
    num_groups=None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """loss = sum of weights * token losses. [same shape as mask] float32, 0 outside the mask.

    The counts are those of the whole mini-batch where this call sees a part of it; by default, of what it sees.
    """
    mode = config.loss_agg_mode
    mask = mask.float()
    if mode == "token-mean":
        return mask / _count("num_tokens", num_tokens, layout.response_sum(mask).sum().clamp(min=1), mask.device)
    if mode == "group-token-mean":
        return mask / layout.to_tokens(_group_denominators(mask, layout, group_ids, num_groups))
    weights = mask / _count("num_responses", num_responses, max(layout.num_responses, 1), mask.device)
    if mode == "seq-mean-token-mean":
        return weights / layout.to_tokens(layout.response_sum(mask).clamp(min=1))
    if mode == "seq-mean-token-sum-norm":
        return weights / config.loss_scale_factor
    return weights


def _group_denominators(mask: Tensor, layout: Padded | Packed, group_ids: Tensor | None, num_groups) -> Tensor:
    """[B]: tokens of the response's group, times the number of groups."""
    if group_ids is None:
        raise ValueError("group_ids is None with loss_agg_mode='group-token-mean': it must be [B] group numbers")
    check_integers("group_ids", group_ids)
    check_like("group_ids", group_ids, torch.Size((layout.num_responses,)), mask.device)
    same_group = (group_ids[:, None] == group_ids[None, :]).float()
    groups_here = same_group.sum(1).reciprocal().sum().round()  # each group's members add up to 1
    # a sum rather than a matmul: autocast would round the counts
    group_tokens = (same_group * layout.response_sum(mask)).sum(1).clamp(min=1)
    return group_tokens * _count("num_groups", num_groups, groups_here, mask.device)


def _count(name: str, given, default, device: torch.device):
    """The caller's count of the whole mini-batch, or what this call sees."""
    if given is None:
        return default
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(given.shape)}: it must be a number, or a tensor of one")
        check_device(name, given, device)
        return given.detach().float().reshape(())
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise TypeError(f"{name} is {given!r}: it must be a number, or a tensor of one")
    if not given > 0:
        raise ValueError(f"{name} is {given}: it must be above 0")
    return given
