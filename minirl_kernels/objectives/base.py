"""An objective of the policy loss: the class that a new one derives from, and the ratios that it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "sequence_mean"]
Weighting = Literal["d", "d in loss", "w in loss"]


@dataclass(frozen=True)
class TokenRatios:
    """The log-ratios of each token, float64 tensors of one shape; 0 where a token is masked.

    r = pi_theta / pi_old, d = pi_old / mu_old, w = pi_theta / mu_old. Where a level is not "token", a log-ratio is the
    response's at each of its tokens.
    """

    log_prob: Tensor  # log pi_theta
    log_r: Tensor
    log_w: Tensor
    log_d: Tensor
    advantages: Tensor
    threshold: float = float("inf")  # upper bound of the weight, d or w

    @property
    def r(self) -> Tensor:
        return self.log_r.exp()

    @property
    def d(self) -> Tensor:
        """The correction, at most `threshold`."""
        return self.log_d.exp().clamp(max=self.threshold)

    @property
    def w(self) -> Tensor:
        """The whole weight, at most `threshold`."""
        return self.log_w.exp().clamp(max=self.threshold)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One term of the policy loss. A new objective is a frozen dataclass that derives from this one.

    It is given as `PolicyLossConfig(objective=MyObjective(...))`, and its parameters are its fields. It needs `loss`
    alone; `bounds_met` serves the metrics. Every fused loss then runs it in two phases: log-probabilities, the
    derivative by `loss`, the gradient. Both methods must be torch operations that torch.compile can trace.

    level: the level of r. "token": each token's own. "sequence": the product over the response. "sequence_mean": its
        geometric mean. A token's gradient depends on its whole response unless it is "token".
    weighting: how the train-inference correction enters. "d": `loss` leaves it out, and its two results are
        multiplied by d. "d in loss", "w in loss": `loss` has already used d, or w.
    preset: fields of PolicyLossConfig that `PolicyLossConfig.preset` sets for it.
    """

    level: ClassVar[Level] = "token"
    weighting: ClassVar[Weighting] = "d"
    preset: ClassVar[Mapping[str, object]] = {}

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        """(loss, d loss / d log_prob) of every token, before aggregation: minus the objective.

        At "sequence" the loss is the response's, of which each token shows an equal share. At "sequence_mean" each
        token has the whole, as in GSPO's token form. Where the advantage is 0 both must be 0, also beside an infinite
        ratio (see `times`), and a NaN must stay NaN.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method loss: an objective must have one")

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        """Where the objective's upper and its lower bound change the gradient, two bools; by default nowhere."""
        nowhere = torch.zeros_like(token.log_r, dtype=torch.bool)
        return nowhere, nowhere

    def check_rollout_is(self, rollout_is: object) -> None:
        """Raise ValueError for a `PolicyLossConfig.rollout_is` that makes no sense with this objective."""

    @property
    def is_sequence_level(self) -> bool:
        """Whether a token's gradient depends on the other tokens of its response."""
        return self.level != "token"

    @property
    def weighs_by_w(self) -> bool:
        """Whether the weight is w = pi_theta / mu_old itself, rather than d beside r."""
        return self.weighting == "w in loss"


def times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor, with 0 where one of them is 0 even if the other overflowed; NaN goes through."""
    nothing = ((factor == 0) & ~weight.isnan()) | ((weight == 0) & ~factor.isnan())
    return torch.where(nothing, 0.0, weight * factor)


def masked_gradient(token: TokenRatios, stopped: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log_prob) of sg[M w] A log pi, with M = 0 where `stopped`."""
    grad = times(-token.w, token.advantages.masked_fill(stopped, 0.0))
    return times(token.log_prob, grad), grad
