"""The arguments of the kernels over tokens, as records that become arguments of registered ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...config import PolicyLossConfig
from .objective_kernels import has_kernel, objective_options


class TokenValues(NamedTuple):
    """The inputs of a loss per token, float32 [B, L] or [T]. offsets: [B + 1], or None for [B, L]."""

    mask: Tensor  # bool
    weights: Tensor
    advantages: Tensor
    old_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    offsets: Tensor | None


class InputValues(NamedTuple):
    """The arguments of a loss per token, of any dtype and strides."""

    token_ids: Tensor | None
    loss_mask: Tensor | None  # numbers; uint8 for bool
    old_log_probs: Tensor | None
    rollout_log_probs: Tensor | None
    ref_log_probs: Tensor | None
    advantages: Tensor | None  # or one per response


class WeightOptions(NamedTuple):
    """The weights of PolicyLossConfig.loss_agg_mode. A count of 0 means the count of this call."""

    count: Tensor | None  # of one element, on the device
    count_number: float
    scale: float
    mode: str

    @property
    def counts_here(self) -> bool:
        """Whether the kernels count the tokens, or the groups, that a weight divides by."""
        is_given = self.count is not None or self.count_number
        return not is_given and self.mode in ("token-mean", "group-token-mean")


class TokenResults(NamedTuple):
    """The results of each token: float32; the last three are bool."""

    log_probs: Tensor  # any float dtype
    entropy: Tensor | None  # any float dtype
    token_loss: Tensor | None  # without the entropy term; None: the kernel computes it and token_grad
    token_grad: Tensor | None
    clip_high: Tensor | None = None  # None, like the next two: the kernel computes it
    clip_low: Tensor | None = None
    truncated: Tensor | None = None


class LossOptions(NamedTuple):
    """The loss in the kernel. objective: the name of a function of the kernels, or "" if clip_high … are given."""

    objective: str
    clip: bool
    ratio_low: float
    ratio_high: float
    threshold: float
    corrects: bool  # whether the weight has d
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    @classmethod
    def of(cls, config: PolicyLossConfig) -> LossOptions:
        is_known = takes_kernel(config)
        options = objective_options(config.policy_objective) if is_known else _NO_OBJECTIVE
        return cls(
            **options,
            threshold=float("inf") if config.rollout_is_threshold is None else config.rollout_is_threshold,
            corrects=config.rollout_is is not None,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
        )


_NO_OBJECTIVE = {"objective": "", "clip": False, "ratio_low": 0.0, "ratio_high": 0.0}


def takes_kernel(config: PolicyLossConfig) -> bool:
    """Whether the kernels have the objective and the correction. Otherwise torch computes them."""
    return has_kernel(config.policy_objective) and config.rollout_is in ("token", None)
