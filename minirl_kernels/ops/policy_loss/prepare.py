"""The mask, the weight and the values of each token, from the arguments of a loss: by torch, or by the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...common.checks import IGNORE_INDEX, check_device, check_finite, check_like, check_per_token_float
from ...config import PolicyLossConfig
from .aggregation import COUNT_OF_MODE, check_count, check_groups, token_weights
from .by_kernels import inputs_by_kernels
from .kernel_arguments import InputValues, WeightOptions
from .layout import Packed, Padded, check_layout, make_layout

PER_TOKEN = ("old_log_probs", "rollout_log_probs", "ref_log_probs", "advantages")


class Arguments(NamedTuple):
    """The arguments of a loss that are tensors, but its log-probabilities."""

    shape: torch.Size
    device: torch.device
    token_ids: Tensor | None
    loss_mask: Tensor | None
    cu_seqlens: Tensor | None
    group_ids: Tensor | None
    old_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    advantages: Tensor

    def num_responses(self) -> int:
        return self.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def per_token(self) -> dict[str, Tensor]:
        """The values per token that are given. Advantages may be one per response."""
        return {name: getattr(self, name) for name in PER_TOKEN if getattr(self, name) is not None}


class Prepared(NamedTuple):
    """The values of PolicyLossInputs, and the token_ids, -100 where a token is not in the loss."""

    layout: Padded | Packed
    token_ids: Tensor | None
    values: dict[str, Any]


def prepare_by_torch(arguments: Arguments, counts: dict[str, Any], config: PolicyLossConfig, raises: bool) -> Prepared:
    """counts: num_responses, num_tokens and num_groups of the caller. raises: the same as in PolicyLossInputs."""
    shape, device = arguments.shape, arguments.device
    layout = make_layout(shape, arguments.cu_seqlens, device)
    _check_loss_mask(arguments)
    if arguments.loss_mask is None:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        mask = arguments.loss_mask != 0
    token_ids = arguments.token_ids
    if token_ids is not None:
        mask = mask & ~(token_ids == IGNORE_INDEX)
        token_ids = ids_in_loss(token_ids, mask)
    weights = token_weights(mask, layout, config, **counts, group_ids=arguments.group_ids, raises=raises)
    _check_per_token(arguments)
    given = {name: values.detach().float() for name, values in arguments.per_token().items()}
    if arguments.advantages.shape == (layout.num_responses,):
        given["advantages"] = layout.to_tokens(given["advantages"])
    per_token: dict[str, Tensor | None] = {**dict.fromkeys(PER_TOKEN), **given}
    if raises:
        per_token |= {name: check_finite(name, values, mask, layout.offsets) for name, values in given.items()}
    else:
        # every objective passes on the NaN of an advantage; the NaN of a ratio can vanish in a comparison
        bad = mask & ~torch.stack([values.isfinite() for values in given.values()]).all(0)
        per_token["advantages"] = torch.where(bad, torch.nan, given["advantages"])
    return Prepared(layout, token_ids, {"mask": mask, "weights": weights, **per_token})


def prepare_by_kernels(arguments: Arguments, counts: dict[str, Any], config: PolicyLossConfig) -> Prepared:
    """The same without raises: a value that is not finite makes the advantage of its token NaN."""
    shape, cu_seqlens = arguments.shape, arguments.cu_seqlens
    check_layout(shape, cu_seqlens, arguments.device)
    _check_loss_mask(arguments)
    by_group = config.loss_agg_mode == "group-token-mean"
    if by_group:
        check_groups(arguments.group_ids, arguments.num_responses(), arguments.device)
    name = COUNT_OF_MODE[config.loss_agg_mode]
    count = counts[name]
    if count is not None:
        check_count(name, count, arguments.device)
    _check_per_token(arguments)
    is_tensor = isinstance(count, Tensor)
    options = WeightOptions(
        count.detach() if is_tensor else None,
        0.0 if is_tensor or count is None else float(count),
        1.0 if config.loss_scale_factor is None else config.loss_scale_factor,
        config.loss_agg_mode,
    )
    loss_mask = arguments.loss_mask
    if loss_mask is not None and loss_mask.dtype == torch.bool:
        loss_mask = loss_mask.view(torch.uint8)
    given = {name: values.detach() for name, values in arguments.per_token().items()}
    values = InputValues(arguments.token_ids, loss_mask, *(given.get(name) for name in PER_TOKEN))
    group_ids = arguments.group_ids if by_group else None
    offsets, token_ids, mask, weights, *per_token = inputs_by_kernels(cu_seqlens, group_ids, shape, *values, *options)
    layout = Padded(shape, arguments.device) if cu_seqlens is None else Packed(shape, offsets)
    results = dict(zip(PER_TOKEN, per_token, strict=True))
    return Prepared(
        layout,
        None if arguments.token_ids is None else token_ids,
        {"mask": mask, "weights": weights, **dict.fromkeys(PER_TOKEN), **{name: results[name] for name in given}},
    )


def ids_in_loss(token_ids: Tensor, mask: Tensor) -> Tensor:
    """token_ids, contiguous, with -100 outside the mask."""
    return token_ids.masked_fill(~mask, IGNORE_INDEX).contiguous()


def _check_loss_mask(arguments: Arguments) -> None:
    loss_mask = arguments.loss_mask
    if loss_mask is None:
        return
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"loss_mask is a {type(loss_mask).__name__}: it must be a tensor, or None for all tokens")
    check_like("loss_mask", loss_mask, arguments.shape, arguments.device)


def _check_per_token(arguments: Arguments) -> None:
    shape, device, advantages = arguments.shape, arguments.device, arguments.advantages
    for name in PER_TOKEN[:-1]:
        if getattr(arguments, name) is not None:
            check_per_token_float(name, getattr(arguments, name), shape, device)
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        kind = getattr(advantages, "dtype", type(advantages).__name__)
        raise TypeError(f"advantages is a {kind}: it must be a floating point tensor")
    if advantages.shape != (arguments.num_responses(),) and advantages.shape != shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: it must be [{arguments.num_responses()}], one per "
            f"response, or {tuple(shape)}, one per token"
        )
    check_device("advantages", advantages, device)
