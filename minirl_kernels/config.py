"""Options of the policy loss: one frozen dataclass with its presets and its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from .common.options import check_bool, check_choice, check_number
from .correction import Correction
from .objectives import NAMED, Objective
from .objectives.clipped import RatioBounds

ObjectiveName = Literal["minirl", "reinforce", "sequence_is", "grpo", "cispo", "gspo"]
LossAggMode = Literal[
    "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-mean", "group-token-mean"
]
RolloutIS = Literal["token", "sequence"]
KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The objective of the policy loss, its bounds and its aggregation. `PolicyLossConfig()` is MiniRL (Eq. 7).

    Symbols per token: r = pi_theta / pi_old, d = pi_old / mu_old, w = d * r = pi_theta / mu_old.

    objective: "minirl", "reinforce" (Eq. 3/4), "sequence_is" (Eq. 1/2), "grpo", "cispo" (Appendix A) or "gspo"; or an
        instance of a subclass of `objectives.Objective`. An instance has its parameters in its own fields. With an
        instance, clip, clip_ratio_low and clip_ratio_high must keep their defaults.
    clip: apply the objective's bounds on r. False is the "no clipping" ablation.
    clip_ratio_low, clip_ratio_high: the bounds on r are 1 - clip_ratio_low and 1 + clip_ratio_high. CISPO and GSPO
        follow the same rule. In TRL, epsilon_high is the upper bound itself for CISPO.
    rollout_is: the level of the train-inference correction d.
        "token": d_t of each token. "sequence": the product of d over the response. None: no correction (d = 1).
        Objectives that weigh by w (MiniRL, REINFORCE, sequence IS, DPPO) use the correction inside w.
        The other objectives are multiplied by sg[min(d, rollout_is_threshold)].
        A `Correction` has a level, bounds and masks. Its weight replaces d and its bounds replace
        rollout_is_threshold. Objectives that weigh by w can have rollout_is_threshold too, as the bound of w.
    rollout_is_threshold: upper bound of the weight: of w for objectives that weigh by w, of d for the other
        objectives. None means no bound.
    loss_agg_mode: how per-token losses become a scalar:
        "seq-mean-token-sum": sum over tokens, mean over responses (MiniRL);
        "seq-mean-token-mean": mean over a response's tokens, mean over responses;
        "seq-mean-token-sum-norm": sum over tokens / loss_scale_factor, mean over responses;
        "token-mean": mean over all tokens;
        "group-token-mean": mean over a group's tokens, mean over groups (CISPO; needs group_ids).
    loss_scale_factor: the divisor of "seq-mean-token-sum-norm", usually the maximum response length.
    entropy_coef: the loss includes -entropy_coef * H, aggregated by loss_agg_mode.
    kl_coef, kl_estimator: the loss includes kl_coef * KL(pi_theta || pi_ref), estimated per token by k1, k2 or k3.

    Raises ValueError or TypeError that names the field, for a wrong value or for fields that contradict each other.
    """

    objective: ObjectiveName | Objective = "minirl"
    clip: bool = True
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.27
    rollout_is: RolloutIS | Correction | None = "token"
    rollout_is_threshold: float | None = 5.0
    loss_agg_mode: LossAggMode = "seq-mean-token-sum"
    loss_scale_factor: float | None = None
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"

    def __post_init__(self):
        if not isinstance(self.objective, Objective) and self.objective not in tuple(NAMED):
            names = ", ".join(repr(name) for name in NAMED)
            raise ValueError(f"objective is {self.objective!r}: it must be one of {names}, or an Objective instance")
        check_choice("loss_agg_mode", self.loss_agg_mode, get_args(LossAggMode))
        check_choice("kl_estimator", self.kl_estimator, get_args(KLEstimator))
        if not isinstance(self.rollout_is, Correction):
            check_choice("rollout_is", self.rollout_is, (*get_args(RolloutIS), None))
        check_bool("clip", self.clip)
        RatioBounds(clip_ratio_low=self.clip_ratio_low, clip_ratio_high=self.clip_ratio_high)  # checks both values
        check_number("entropy_coef", self.entropy_coef, "finite", math.isfinite)
        check_number("kl_coef", self.kl_coef, "finite and at least 0", lambda v: 0 <= v < math.inf)
        if self.rollout_is_threshold is not None:
            check_number("rollout_is_threshold", self.rollout_is_threshold, "above 0, or None", lambda v: v > 0)
        object.__setattr__(self, "_policy_objective", self._make_objective())
        self._check_combination()

    def _check_combination(self):
        if (self.loss_scale_factor is not None) != (self.loss_agg_mode == "seq-mean-token-sum-norm"):
            raise ValueError(
                f"loss_scale_factor is {self.loss_scale_factor} with loss_agg_mode={self.loss_agg_mode!r}: "
                "it must be given with 'seq-mean-token-sum-norm', and with no other mode"
            )
        if self.loss_scale_factor is not None:
            check_number("loss_scale_factor", self.loss_scale_factor, "above 0", lambda v: v > 0)
        self.policy_objective.check_rollout_is(self.rollout_is)
        if self.rollout_is_threshold is not None and not self.weighs_by_w:
            if self.rollout_is is None:
                raise ValueError(
                    f"rollout_is_threshold is {self.rollout_is_threshold} with objective={self.objective!r} and "
                    "rollout_is=None: there is no weight to truncate, so rollout_is_threshold must be None"
                )
            if isinstance(self.rollout_is, Correction):
                raise ValueError(
                    f"rollout_is_threshold is {self.rollout_is_threshold} with objective={self.objective!r} and "
                    f"rollout_is={self.rollout_is!r}: the Correction has bounds of its own, so rollout_is_threshold "
                    "must be None"
                )

    def _make_objective(self) -> Objective:
        """The given instance, or an instance of the named class with its fields taken from this config."""
        if isinstance(self.objective, Objective):
            for name in _OBJECTIVE_FIELDS:
                value, default = getattr(self, name), getattr(PolicyLossConfig, name)
                if value != default:
                    raise ValueError(
                        f"{name} is {value} with objective={self.objective!r}: it must be {default}, its default, "
                        "since only the objectives that are given by name read it"
                    )
            return self.objective
        own = _OWN_FIELDS[self.objective]
        if self.clip and "clip" not in own:
            raise ValueError(
                f"clip is True with objective={self.objective!r}: this objective has no bound on the ratio, so clip "
                "must be False (objective='minirl' is REINFORCE with such a bound)"
            )
        return NAMED[self.objective](**{name: getattr(self, name) for name in own})

    @property
    def policy_objective(self) -> Objective:
        """The objective as an instance of its class, also if the config has its name."""
        return self._policy_objective  # type: ignore[attr-defined]  # declared, it would be a field

    @property
    def correction(self) -> Correction | None:
        """rollout_is as a Correction. For "token" and "sequence" it has no bounds: rollout_is_threshold applies."""
        return _CORRECTIONS[self.rollout_is] if isinstance(self.rollout_is, str) else self.rollout_is

    @property
    def is_sequence_level(self) -> bool:
        """Whether a token's gradient depends on the other tokens of its response. Fused calls then run two phases."""
        return self.policy_objective.is_sequence_level

    @property
    def weighs_by_w(self) -> bool:
        """Whether the weight is w = pi_theta / mu_old. The other objectives use r, and d as a separate factor."""
        return self.policy_objective.weighs_by_w

    @property
    def needs_rollout_log_probs(self) -> bool:
        """Whether the loss itself, and not only the metrics, needs rollout_log_probs."""
        return self.rollout_is is not None

    @classmethod
    def preset(cls, name: ObjectiveName | Objective, **overrides) -> PolicyLossConfig:
        """The preset of an objective with some fields changed: `preset("grpo", clip_ratio_high=0.28)`.

        name: the name of an objective, or an instance of a subclass of `objectives.Objective`.
        overrides: fields of PolicyLossConfig with their values.
        Raises TypeError for an unknown field, and ValueError for an unknown name.
        """
        if not isinstance(name, Objective):
            check_choice("preset", name, get_args(ObjectiveName))
        for field in overrides:
            if field not in _FIELDS:
                raise TypeError(f"PolicyLossConfig has no field {field!r}: it must be one of {', '.join(_FIELDS)}")
        if isinstance(name, Objective):
            return cls(**{"objective": name, **name.preset, **overrides})
        return cls(**{"objective": name, "clip": False, **_OWN_FIELDS[name], **NAMED[name].preset, **overrides})

    @classmethod
    def minirl(cls, **overrides) -> PolicyLossConfig:
        """MiniRL, Eq. 7, with w truncated at 5.

        The ablations of the paper are `loss_agg_mode="seq-mean-token-mean"` (length normalisation),
        `rollout_is=None` (no train-inference correction) and `clip=False` (no clipping).
        """
        return cls.preset("minirl", **overrides)

    @classmethod
    def reinforce(cls, **overrides) -> PolicyLossConfig:
        """REINFORCE with token-level importance sampling, Eq. 3/4: no mask, no truncation."""
        return cls.preset("reinforce", **overrides)

    @classmethod
    def sequence_is(cls, **overrides) -> PolicyLossConfig:
        """The sequence-level objective, Eq. 1/2: the weight is the product of w over the response."""
        return cls.preset("sequence_is", **overrides)

    @classmethod
    def grpo(cls, **overrides) -> PolicyLossConfig:
        """GRPO, Appendix A. Its advantages are `group_advantages(..., norm_by_std=True)`."""
        return cls.preset("grpo", **overrides)

    @classmethod
    def cispo(cls, **overrides) -> PolicyLossConfig:
        """CISPO, Appendix A. Its advantages are `group_advantages(..., norm_by_std=True)`. The loss needs group_ids."""
        return cls.preset("cispo", **overrides)

    @classmethod
    def gspo(cls, **overrides) -> PolicyLossConfig:
        """GSPO (arXiv 2507.18071): one length-normalised ratio per response, clipped to [1 - 3e-4, 1 + 4e-4]."""
        return cls.preset("gspo", **overrides)


_FIELDS = tuple(field.name for field in fields(PolicyLossConfig))
_CORRECTIONS = {level: Correction(level=level) for level in get_args(RolloutIS)}
_OBJECTIVE_FIELDS = ("clip", "clip_ratio_low", "clip_ratio_high")
# the fields of each named objective with their defaults; a table, because torch.compile does not trace `fields`
_OWN_FIELDS = {name: {field.name: field.default for field in fields(cls)} for name, cls in NAMED.items()}
