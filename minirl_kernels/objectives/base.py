"""The base class of the objectives of the policy loss, and the ratios that an objective receives."""

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
    """The log-ratios of each token: float64 tensors of one shape, [B, L] or [T].

    r = pi_theta / pi_old, d = pi_old / mu_old, w = r d. The level of r is the level of the objective. The weight of a
    Correction replaces d: it has a level of its own, and log_d is -inf where it masks a token. At a level other than
    "token", every token of a response has the log-ratio of the response. Tokens outside the loss mask count as 0.

    log_prob: log pi_theta of the token, in nats.
    log_r, log_w, log_d: logarithms of r, w and d.
    advantages: float32, of the same shape.
    threshold: upper bound of d and of w, of which an objective uses one.
    """

    log_prob: Tensor
    log_r: Tensor
    log_w: Tensor
    log_d: Tensor
    advantages: Tensor
    threshold: float = float("inf")

    @property
    def r(self) -> Tensor:
        """The ratio r, without a bound."""
        return self.log_r.exp()

    @property
    def d(self) -> Tensor:
        """The correction d, at most `threshold`."""
        return self.log_d.exp().clamp(max=self.threshold)

    @property
    def w(self) -> Tensor:
        """The weight w, at most `threshold`."""
        return self.log_w.exp().clamp(max=self.threshold)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base class of the objectives. A new objective is a frozen dataclass that derives from it.

    Its fields are its parameters, and `PolicyLossConfig(objective=MyObjective(...))` uses it. A subclass must define
    `loss`. It may define `bounds_met`, which the metrics use. Both methods must consist of torch operations that
    torch.compile can trace. The fused losses run a new objective in two phases: first the log-probabilities and
    `loss`, then the gradient of the logits.

    level: the level of r. "token": r of each token. "sequence": the product over the response. "sequence_mean": the
        geometric mean over the response. At the last two levels a token's gradient depends on its whole response.
    weighting: how the train-inference correction enters. "d": `loss` does not use d, and the caller multiplies both
        results of `loss` by d. "d in loss": `loss` uses d. "w in loss": `loss` uses w.
    preset: the fields of PolicyLossConfig that `PolicyLossConfig.preset` sets for this objective.
    """

    level: ClassVar[Level] = "token"
    weighting: ClassVar[Weighting] = "d"
    preset: ClassVar[Mapping[str, object]] = {}

    def loss(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        """(loss, d loss / d log_prob) of every token before aggregation. The loss is minus the objective.

        At level "sequence" the loss of a token is the loss of its response, and the caller divides it, but not the
        derivative, by the number of tokens. At level "sequence_mean" the caller does not divide, as in GSPO's token
        form. If the advantage is 0, both results must be 0, even if a ratio is infinite (use `times`). A NaN must stay
        NaN.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method loss: an objective must have one")

    def bounds_met(self, token: TokenRatios) -> tuple[Tensor, Tensor]:
        """(upper, lower): bool tensors, True where this bound on r changes the gradient. By default all are False."""
        all_false = torch.zeros_like(token.log_r, dtype=torch.bool)
        return all_false, all_false

    def check_rollout_is(self, rollout_is: object) -> None:
        """Raise ValueError if this objective does not support this value of `PolicyLossConfig.rollout_is`."""

    @property
    def is_sequence_level(self) -> bool:
        """Whether a token's gradient depends on the other tokens of its response."""
        return self.level != "token"

    @property
    def weighs_by_w(self) -> bool:
        """Whether the weight is w = pi_theta / mu_old, rather than d as a separate factor."""
        return self.weighting == "w in loss"


def times(weight: Tensor, factor: Tensor) -> Tensor:
    """weight * factor, and 0 where one of them is 0, even if the other is infinite. A NaN stays NaN."""
    is_zero = ((factor == 0) & ~weight.isnan()) | ((weight == 0) & ~factor.isnan())
    return torch.where(is_zero, 0.0, weight * factor)


def masked_gradient(token: TokenRatios, stopped: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, d loss / d log_prob) of the objective sg[M w] A log pi, with M = 0 where `stopped`, else 1.

    sg stops the gradient: the derivative treats M w as a constant.
    """
    grad = times(-token.w, token.advantages.masked_fill(stopped, 0.0))
    return times(token.log_prob, grad), grad
