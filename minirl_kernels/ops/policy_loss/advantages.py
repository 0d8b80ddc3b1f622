"""Group-relative advantages: the reward of a response minus the mean reward of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from ...common.checks import check_integers, check_like, check_tensor
from ...common.library import register


def group_advantages(rewards: Tensor, group_ids: Tensor, *, norm_by_std: bool = False) -> Tensor:
    """The reward of each response minus the mean reward of its group (the paper's A-hat).

    The mean includes the response itself. The call waits for the device.

    rewards: [B], floating point, one per response.
    group_ids: [B], integers in any order. The responses to one prompt have equal numbers.
    norm_by_std: divide by the standard deviation of the group, as in GRPO (Bessel's correction, no epsilon).
    Returns [B] float32. A group of equal rewards gives exactly 0.
    Raises ValueError or TypeError for wrong shapes and dtypes, for rewards that are not finite, and for a group of one
        response.
    """
    check_tensor("rewards", rewards)
    if not rewards.is_floating_point() or rewards.dim() != 1:
        raise TypeError(f"rewards has dtype {rewards.dtype}, shape {tuple(rewards.shape)}: it must be floats [B]")
    check_integers("group_ids", group_ids)
    check_like("group_ids", group_ids, rewards.shape, rewards.device)
    return _group_advantages(rewards.detach(), group_ids, norm_by_std)


def _advantages(rewards, group_ids, norm_by_std):
    if not bool(rewards.isfinite().all()):
        bad = (~rewards.isfinite()).nonzero()[0].item()
        raise ValueError(f"rewards is {rewards[bad].item()} at response {bad}: it must be finite")
    labels, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if bool((sizes < 2).any()):
        alone = labels[sizes < 2][0].item()
        raise ValueError(f"group_ids has one response in group {alone}: a group must have at least 2 responses")
    if not rewards.numel():
        return torch.empty_like(rewards, dtype=torch.float32)
    # one row per group, so that a sum has a fixed order; NaN pads the groups to the size of the largest group
    order = torch.argsort(group, stable=True)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(len(group), device=group.device) - starts[group[order]]
    table = rewards.new_full((len(sizes), int(sizes.max())), torch.nan, dtype=torch.float64)
    table[group[order], place] = rewards[order].double()
    table = table - table[:, :1]  # so that equal rewards are exactly 0
    centred = table - table.nanmean(1, keepdim=True)
    if norm_by_std:
        std = (centred.square().nansum(1, keepdim=True) / (sizes[:, None] - 1)).sqrt()
        centred = torch.where(std > 0, centred / std, 0.0)
    advantages = torch.empty_like(rewards, dtype=torch.float32)
    advantages[order] = centred[group[order], place].float()
    return advantages


# an op, because torch.compile cannot trace shapes that depend on the values of group_ids
_group_advantages = register(
    "group_advantages(Tensor rewards, Tensor group_ids, bool norm_by_std) -> Tensor",
    _advantages,
    lambda rewards, *_: torch.empty_like(rewards, dtype=torch.float32),
)
