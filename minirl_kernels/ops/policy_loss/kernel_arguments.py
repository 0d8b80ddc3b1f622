"""The arguments of the kernels over tokens, as records that become arguments of registered ops."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ...config import PolicyLossConfig


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
    """The results of each token, floats; the last two are bool.

    token_loss, token_grad: None: the kernel computes them. With the options of an objective they are float32, and
    complete but for the entropy term. Without, they are float64, the results of `Objective.loss`.
    clip_high, clip_low: the results of `Objective.bounds_met`. None: the kernel computes them.
    """

    log_probs: Tensor  # any float dtype
    entropy: Tensor | None  # any float dtype
    token_loss: Tensor | None = None
    token_grad: Tensor | None = None
    clip_high: Tensor | None = None
    clip_low: Tensor | None = None


class CorrectionOptions(NamedTuple):
    """A Correction in the kernels. correction: its level, "none", or "plain" for d of the token without bounds."""

    correction: str
    lower: float  # 0 for no bound
    upper: float  # inf for no bound
    beyond: str
    weighs: bool
    normalise: bool

    @classmethod
    def of(cls, config: PolicyLossConfig) -> CorrectionOptions:
        correction = config.correction
        if correction is None:
            return cls("none", 0.0, math.inf, "truncate", True, False)
        level = "plain" if config.rollout_is == "token" else correction.level
        lower = 0.0 if correction.lower is None else correction.lower
        upper = math.inf if correction.upper is None else correction.upper
        return cls(level, lower, upper, correction.beyond, correction.weighs, correction.normalise)

    @property
    def changes_d(self) -> bool:
        """Whether the weight is another number than d of the token."""
        return self.correction not in ("none", "plain")

    @property
    def needs_responses(self) -> bool:
        """Whether a token's weight depends on the other tokens of its response or of the call."""
        by_response = self.correction in ("sequence", "sequence_mean") or self.beyond == "mask_response"
        return by_response or self.normalise


class ResponseSums(NamedTuple):
    """Sums of each block of tokens for values of whole responses, and the log of the mean weight of the call."""

    of_blocks: Tensor | None = None
    log_mean: Tensor | None = None


class LossOptions(NamedTuple):
    """The loss beside its objective and its correction. weighting: Objective.weighting."""

    weighting: str
    threshold: float
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    @classmethod
    def of(cls, config: PolicyLossConfig) -> LossOptions:
        return cls(
            config.policy_objective.weighting,
            threshold=math.inf if config.rollout_is_threshold is None else config.rollout_is_threshold,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
        )
