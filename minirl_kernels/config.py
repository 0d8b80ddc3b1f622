"""Options of the policy loss: one frozen dataclass, its presets, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

Objective = Literal["minirl", "reinforce", "sequence_is", "grpo", "cispo", "gspo"]
LossAggMode = Literal[
    "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean", "group-token-mean"
]
RolloutIS = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Which objective, with which bounds, summed how. `PolicyLossConfig()` is MiniRL (Eq. 7).

    Symbols per token: r = pi_theta / pi_old, d = pi_old / mu_old, w = d * r = pi_theta / mu_old.

    objective: "minirl", "reinforce" (Eq. 3/4), "sequence_is" (Eq. 1/2), "grpo", "cispo" (Appendix A), "gspo".
    clip: apply the objective's bound on r; False gives the "no clipping" ablation.
    clip_ratio_low, clip_ratio_high: the bounds are 1 - low and 1 + high (also for CISPO and GSPO; TRL's CISPO
        bound of the same name is the ratio itself).
    rollout_is: level of the train-inference correction d. "token": d_t. "sequence": the product of d over the
        response. None: no correction (d = 1). MiniRL, REINFORCE and sequence IS use it inside w; GRPO, CISPO and
        GSPO are multiplied by sg[min(d, rollout_is_threshold)].
    rollout_is_threshold: upper bound C of that weight (of w itself in MiniRL and REINFORCE); None means none.
    loss_agg_mode: how per-token losses become a scalar:
        "seq-mean-token-sum": sum over tokens, mean over responses (MiniRL);
        "seq-mean-token-mean": mean over a response's tokens, mean over responses;
        "seq-mean-token-sum-norm": sum over tokens / loss_scale_factor, mean over responses;
        "token-mean": mean over all tokens;
        "group-token-mean": mean over a group's tokens, mean over groups (CISPO; needs group_ids).
    loss_scale_factor: the constant of "seq-mean-token-sum-norm", usually the maximum response length.
    entropy_coef: subtracts entropy_coef * H from the loss, aggregated alike.
    kl_coef, kl_estimator: adds kl_coef * KL(pi_theta || pi_ref), estimated per token by k1, k2 or k3.

    Raises ValueError or TypeError, naming the field, for a combination that means nothing.
    """

    objective: Objective = "minirl"
    clip: bool = True
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.27
    rollout_is: RolloutIS | None = "token"
    rollout_is_threshold: float | None = 5.0
    loss_agg_mode: LossAggMode = "seq-mean-token-sum"
    loss_scale_factor: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self):
        _check_choice("objective", self.objective, get_args(Objective))
        _check_choice("loss_agg_mode", self.loss_agg_mode, get_args(LossAggMode))
        _check_choice("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        _check_choice("rollout_is", self.rollout_is, (*get_args(RolloutIS), None))
        if not isinstance(self.clip, bool):
            raise TypeError(f"clip is {self.clip!r}: it must be a bool")
        _check_number("clip_ratio_low", self.clip_ratio_low, "in [0, 1]", lambda v: 0 <= v <= 1)
        _check_number("clip_ratio_high", self.clip_ratio_high, "at least 0", lambda v: v >= 0)
        _check_number("entropy_coef", self.entropy_coef, "finite", math.isfinite)
        _check_number("kl_coef", self.kl_coef, "finite and at least 0", lambda v: 0 <= v < math.inf)
        if self.rollout_is_threshold is not None:
            _check_number("rollout_is_threshold", self.rollout_is_threshold, "above 0, or None", lambda v: v > 0)
        self._check_combination()

    def _check_combination(self):
        if (self.loss_scale_factor is not None) != (self.loss_agg_mode == "seq-mean-token-sum-norm"):
            raise ValueError(
                f"loss_scale_factor is {self.loss_scale_factor} with loss_agg_mode={self.loss_agg_mode!r}: "
                "it must be given with 'seq-mean-token-sum-norm', and with no other mode"
            )
        if self.loss_scale_factor is not None:
            _check_number("loss_scale_factor", self.loss_scale_factor, "above 0", lambda v: v > 0)
        if self.clip and self.objective in ("reinforce", "sequence_is"):
            raise ValueError(
                f"clip is True with objective={self.objective!r}: it has no bound on the ratio, so clip must be "
                "False (objective='minirl' is REINFORCE with one)"
            )
        if self.objective == "sequence_is" and self.rollout_is == "token":
            raise ValueError(
                "rollout_is is 'token' with objective='sequence_is': its weight is one product over the response, "
                "so rollout_is must be 'sequence' or None"
            )

        if self.rollout_is_threshold is not None and self.rollout_is is None and not self.weighs_by_w:
            raise ValueError(
                f"rollout_is_threshold is {self.rollout_is_threshold} with objective={self.objective!r} and "
                "rollout_is=None: there is no weight to truncate, so rollout_is_threshold must be None"
            )

    @property
    def is_sequence_level(self) -> bool:
        """Whether a token's gradient depends on its response's other tokens (a fused call then takes two phases)."""
        return self.objective in ("sequence_is", "gspo")

    @property
    def weighs_by_w(self) -> bool:
        """Whether the weight is w = pi_theta / mu_old itself; the other objectives correct by d beside their r."""
        return self.objective in ("minirl", "reinforce", "sequence_is")

    @property
    def needs_rollout_log_probs(self) -> bool:
        """Whether the loss (not only the metrics) uses mu_old."""
        return self.rollout_is is not None

    @classmethod
    def preset(cls, name: str, **overrides) -> PolicyLossConfig:
        """The preset called `name` with some fields changed: `preset("grpo", clip_ratio_high=0.28)`."""
        _check_choice("preset", name, get_args(Objective))
        for field in overrides:
            if field not in _FIELDS:
                raise TypeError(f"PolicyLossConfig has no field {field!r}: it must be one of {', '.join(_FIELDS)}")
        return cls(**{**_PRESETS[name], **overrides})

    @classmethod
    def minirl(cls, **overrides) -> PolicyLossConfig:
        """MiniRL, Eq. 7, with truncation at 5. Its ablations: `loss_agg_mode="seq-mean-token-mean"` (length norm),
        `rollout_is=None` (without train-inference IS), `clip=False` (without clipping)."""
        return cls.preset("minirl", **overrides)

    @classmethod
    def reinforce(cls, **overrides) -> PolicyLossConfig:
        """REINFORCE with token-level importance sampling, Eq. 3/4: no mask, no truncation."""
        return cls.preset("reinforce", **overrides)

    @classmethod
    def sequence_is(cls, **overrides) -> PolicyLossConfig:
        """The sequence-level objective itself, Eq. 1/2: the product of the ratios over the response."""
        return cls.preset("sequence_is", **overrides)

    @classmethod
    def grpo(cls, **overrides) -> PolicyLossConfig:
        """GRPO, Appendix A; its advantages are `group_advantages(..., norm_by_std=True)`."""
        return cls.preset("grpo", **overrides)

    @classmethod
    def cispo(cls, **overrides) -> PolicyLossConfig:
        """CISPO, Appendix A; its advantages are `group_advantages(..., norm_by_std=True)`. Needs `group_ids`."""
        return cls.preset("cispo", **overrides)

    @classmethod
    def gspo(cls, **overrides) -> PolicyLossConfig:
        """GSPO (arXiv 2507.18071): one length-normalised ratio per response, clipped to 1 - 3e-4, 1 + 4e-4."""
        return cls.preset("gspo", **overrides)


_FIELDS = tuple(field.name for field in fields(PolicyLossConfig))
_GROUP_RELATIVE = {"rollout_is": None, "rollout_is_threshold": None, "loss_agg_mode": "seq-mean-token-mean"}
_PRESETS: dict[str, dict] = {
    "minirl": {},
    "reinforce": {"objective": "reinforce", "clip": False, "rollout_is_threshold": None},
    "sequence_is": {
        "objective": "sequence_is",
        "clip": False,
        "rollout_is": "sequence",
        "rollout_is_threshold": None,
    },
    "grpo": {"objective": "grpo", **_GROUP_RELATIVE},
    "cispo": {"objective": "cispo", **_GROUP_RELATIVE, "loss_agg_mode": "group-token-mean"},
    "gspo": {"objective": "gspo", **_GROUP_RELATIVE, "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
}


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(repr(c) for c in choices)}")


def _check_number(name, value, must_be, holds):
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}: it must be a number {must_be}")
    if not holds(value):
        raise ValueError(f"{name} is {value}: it must be {must_be}")
