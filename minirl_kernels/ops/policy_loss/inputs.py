"""Everything of a policy loss that is known before the log-probabilities are: checked, per token, float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...common.checks import (
    IGNORE_INDEX,
    check_device,
    check_finite,
    check_like,
    check_tensor,
    check_token_ids,
    per_token_float,
)
from ...config import PolicyLossConfig
from .aggregation import token_weights
from .layout import Packed, Padded, make_layout


@dataclass(frozen=True, eq=False)
class PolicyLossInputs:
    """A policy loss without its log-probabilities: arguments checked, brought to one shape, and weighed.

    `prepare` makes it of a mini-batch, `split` cuts it into micro-batches. A loss call takes it as `inputs=…`, in place
    of the arguments that it was made of.

    Per-token tensors share one shape, [B, L] or [T], and are float32 but for the bool `mask`.
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

    @classmethod
    def prepare(
        cls,
        token_ids: Tensor,
        *,
        old_log_probs: Tensor | None,
        rollout_log_probs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
        group_ids: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        num_responses: float | Tensor | None = None,
        num_tokens: float | Tensor | None = None,
        num_groups: float | Tensor | None = None,
        config: PolicyLossConfig = PolicyLossConfig(),
        check: bool = False,
    ) -> PolicyLossInputs:
        """The inputs of a whole mini-batch, or of the part of it that this rank has.

        token_ids: [B, L] (padded, rows are responses) or [T] (packed with cu_seqlens), int32 or int64, of the calls;
            -100 takes the token out of the loss, as loss_mask = 0 does.
        num_responses, num_tokens, num_groups: counts over all ranks; needed only where ranks share a mini-batch.
        The others are those of `policy_loss`. check: raise on a GPU too for what is not finite, which waits for it.
        Raises ValueError or TypeError that names the argument, and the token where it is one token's.
        """
        check_tensor("token_ids", token_ids)
        check_token_ids(token_ids, token_ids.shape, token_ids.device)
        return prepare_inputs(
            token_ids.shape,
            token_ids.device,
            old_log_probs=old_log_probs,
            rollout_log_probs=rollout_log_probs,
            advantages=advantages,
            loss_mask=loss_mask,
            ignored=token_ids == IGNORE_INDEX,
            cu_seqlens=cu_seqlens,
            group_ids=group_ids,
            ref_log_probs=ref_log_probs,
            num_responses=num_responses,
            num_tokens=num_tokens,
            num_groups=num_groups,
            config=config,
            raises=check or token_ids.device.type == "cpu",
        )

    def split(self, sizes: int | Sequence[int]) -> list[PolicyLossInputs]:
        """Micro-batches of whole responses, in order; their losses and gradients sum to those of the whole.

        sizes: how many responses each has (the last may have fewer), or one number for each micro-batch.
        The token_ids and log-probabilities of a call are then those of its micro-batch. Packed inputs on a GPU wait
        for it. Raises TypeError or ValueError if sizes are not counts that sum to the number of responses.
        """
        if self.config.correction is not None and self.config.correction.normalise:
            raise ValueError(
                f"config has rollout_is={self.config.rollout_is!r}: normalise must be False where inputs are split, "
                "since a micro-batch does not see the mean of the mini-batch"
            )
        bounds = _bounds(sizes, self.layout.num_responses)
        return [
            self._with_tensors(lambda values, tokens=tokens: values[tokens], layout)
            for tokens, layout in self.layout.parts(bounds)
        ]

    def shorten(self, length: int) -> PolicyLossInputs:
        """The first `length` tokens of each row, for a micro-batch [B, L] that is padded to less. Waits for the device.

        Raises ValueError for packed inputs, and where a token of the loss would be cut off.
        """
        if not isinstance(self.layout, Padded):
            raise ValueError("inputs is packed, [T]: shorten must be of padded inputs, [B, L]")
        if bool(self.mask[:, length:].any()):
            longest = int(self.mask.nonzero()[:, 1].max()) + 1
            raise ValueError(f"length is {length}: it must be at least {longest}, where the last token of the loss is")
        values = self.mask[:, :length]
        return self._with_tensors(lambda tensor: tensor[:, :length], Padded(values.shape, values.device))

    def to(self, device: torch.device | str) -> PolicyLossInputs:
        return self._with_tensors(lambda values: values.to(device), self.layout.to(device))

    def for_call(
        self, shape: torch.Size, device: torch.device, ignored: Tensor | None, raises: bool
    ) -> PolicyLossInputs:
        """Checked for a call with tokens of this shape, of which `ignored` are out of the loss too."""
        if self.layout.shape != shape:
            raise ValueError(
                f"inputs has the shape {tuple(self.layout.shape)}: it must be {tuple(shape)}, of the call's tokens"
            )
        check_device("inputs", self.mask, device)
        if ignored is None:
            return replace(self, raises=raises)
        mask = self.mask & ~ignored
        weights = torch.where(mask, self.weights, 0.0)
        return replace(self, mask=mask, lengths=_lengths(mask, self.layout), weights=weights, raises=raises)

    @property
    def entropy_grad(self) -> Tensor | None:
        """d loss / d entropy of each token; None without an entropy term."""
        return -self.config.entropy_coef * self.weights if self.config.entropy_coef else None

    def _with_tensors(self, function: Callable[[Tensor], Tensor], layout: Padded | Packed) -> PolicyLossInputs:
        tensors = {name: values for name, values in vars(self).items() if isinstance(values, Tensor)}
        return replace(self, layout=layout, **{name: function(values) for name, values in tensors.items()})


def prepare_inputs(
    shape: torch.Size,
    device: torch.device,
    *,
    inputs: PolicyLossInputs | None = None,
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
    inputs: the caller's own value, which takes the place of all the others.
    """
    if inputs is not None:
        return inputs.for_call(shape, device, ignored, raises)
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
        lengths=_lengths(mask, layout),
        weights=weights,
        **per_token,
        config=config,
        raises=raises,
    )


def _lengths(mask: Tensor, layout: Padded | Packed) -> Tensor:
    return layout.to_tokens(layout.response_sum(mask.float()).clamp(min=1))


def _bounds(sizes: int | Sequence[int], num_responses: int) -> list[int]:
    """Where parts of these sizes begin, and the last one ends."""
    several = isinstance(sizes, Sequence)
    for size in sizes if several else [sizes]:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"sizes has {size!r}: it must be integers, numbers of responses")
        if size < 1:
            raise ValueError(f"sizes has {size}: a micro-batch must have at least 1 response")
    if not several:
        return [*range(0, num_responses, sizes), num_responses]
    if sum(sizes) != num_responses:
        raise ValueError(f"sizes sums to {sum(sizes)}: it must be {num_responses}, the number of responses")
    return [0, *itertools.accumulate(sizes)]


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
