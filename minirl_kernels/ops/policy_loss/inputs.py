"""Everything of a policy loss that is known before the log-probabilities are: checked, per token, float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...common.checks import check_device, check_finite, check_like, per_token_float
from ...config import PolicyLossConfig
from .aggregation import token_weights
from .layout import Packed, Padded, make_layout


@dataclass(frozen=True)
class PolicyLossInputs:
    """Per-token arguments share one shape, [B, L] or [T], and are float32 but for the bool `mask`.

    A token of the mask that has a NaN or an infinity in one of them raises if `raises`, else its advantage is NaN.
    """

    layout: Padded | Packed
    mask: Tensor
    lengths: Tensor  # tokens of the mask in the token's response, at least 1
    weights: Tensor  # d loss / d (a token's own loss); 0 outside the mask
    advantages: Tensor
    old_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    config: PolicyLossConfig
    raises: bool  # what is not finite raises, which waits for the device; else it is NaN in its token's results


def prepare_inputs(
    shape: torch.Size,
    device: torch.device,
    *,
    old_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    group_ids: Tensor | None,
    ref_log_probs: Tensor | None,
    num_responses,
    num_tokens,
    num_groups,
    config: PolicyLossConfig,
    raises: bool,
    ignored: Tensor | None = None,
) -> PolicyLossInputs:
    """Check the arguments of `policy_loss` that its fused forms share, and bring them to one shape.

    raises: as PolicyLossInputs has it. ignored: bool, tokens that are out of the loss whatever loss_mask says.
    """
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config is a {type(config).__name__}: it must be a PolicyLossConfig")
    if rollout_log_probs is None and config.needs_rollout_log_probs:
        raise ValueError(
            f"rollout_log_probs is None with rollout_is={config.rollout_is!r}: the objective weighs by pi/mu, so it "
            "must be the log-probabilities that the inference engine sampled with (or config.rollout_is None)"
        )
    if config.correction is not None:
        config.correction.check_counts(num_responses=num_responses, num_tokens=num_tokens, num_groups=num_groups)
    if ref_log_probs is None and config.kl_coef:
        raise ValueError(f"ref_log_probs is None with kl_coef={config.kl_coef}: it must be the reference policy's")
    layout = make_layout(shape, cu_seqlens, device)
    mask = _loss_mask(loss_mask, shape, device)
    if ignored is not None:
        mask = mask & ~ignored
    lengths = layout.to_tokens(layout.response_sum(mask.float()).clamp(min=1))
    weights = token_weights(
        mask,
        layout,
        config,
        num_responses=num_responses,
        num_tokens=num_tokens,
        num_groups=num_groups,
        group_ids=group_ids,
        raises=raises,
    )
    per_token = {
        "old_log_probs": per_token_float("old_log_probs", old_log_probs, shape, device),
        "rollout_log_probs": per_token_float("rollout_log_probs", rollout_log_probs, shape, device),
        "ref_log_probs": per_token_float("ref_log_probs", ref_log_probs, shape, device),
        "advantages": _per_token_advantages(advantages, layout, device),
    }
    given = {name: values for name, values in per_token.items() if values is not None}
    if raises:
        per_token |= {name: check_finite(name, values, mask, layout.offsets) for name, values in given.items()}
    else:
        # one NaN that every objective lets through: a comparison with the argument itself would not
        bad = mask & ~torch.stack([values.isfinite() for values in given.values()]).all(0)
        per_token["advantages"] = torch.where(bad, torch.nan, per_token["advantages"])
    return PolicyLossInputs(
        layout=layout,
        mask=mask,
        lengths=lengths,
        weights=weights,
        **per_token,
        config=config,
        raises=raises,
    )


def _loss_mask(loss_mask, shape, device):
    if loss_mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if not isinstance(loss_mask, Tensor):
        raise TypeError(f"loss_mask is a {type(loss_mask).__name__}: it must be a tensor, or None for all tokens")
    check_like("loss_mask", loss_mask, shape, device)
    return loss_mask != 0


def _per_token_advantages(advantages, layout, device):
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        kind = getattr(advantages, "dtype", type(advantages).__name__)
        raise TypeError(f"advantages is a {kind}: it must be a floating point tensor")
    if advantages.shape == (layout.num_responses,):
        check_device("advantages", advantages, device)
        return layout.to_tokens(advantages.detach().float())
    if advantages.shape != layout.shape:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: it must be [{layout.num_responses}], one per response, "
            f"or {tuple(layout.shape)}, one per token"
        )
    return per_token_float("advantages", advantages, layout.shape, device)
