"""The arguments of the loss in a kernel: the numbers of each row, and the numbers that all rows share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..policy_loss.inputs import PolicyLossInputs
from ..policy_loss.kernel_arguments import ResponseSums
from ..policy_loss.objective_kernels import objective_options
from ..policy_loss.op import corrected_behaviour


class LossRows(NamedTuple):
    """The loss of rows of logits. Tensors hold one float32 number per row, and are None if the loss does not use them.

    `objective` is the name of a function of the kernels. ratio_low and ratio_high bound r; threshold bounds the weight.
    """

    old_log_probs: Tensor | None  # None: the log-probabilities of the rows themselves
    behaviour_log_probs: Tensor | None  # log mu after the correction; None: old_log_probs
    ref_log_probs: Tensor | None  # None: no KL penalty
    advantages: Tensor
    weights: Tensor
    objective: str
    clip: bool
    ratio_low: float
    ratio_high: float
    threshold: float
    kl_coef: float
    kl_estimator: str
    entropy_coef: float

    @classmethod
    def of(cls, inputs: PolicyLossInputs) -> tuple[LossRows, ResponseSums]:
        """(the record for `inputs`, whose loss must take one sweep; the sums of the correction, for `assemble`)."""
        config = inputs.config
        behaviour, sums = corrected_behaviour(inputs)
        rows = cls(
            old_log_probs=_row_values(inputs.old_log_probs),
            behaviour_log_probs=_row_values(behaviour),
            ref_log_probs=_row_values(inputs.ref_log_probs if config.kl_coef else None),
            advantages=_row_values(inputs.advantages),
            weights=_row_values(inputs.weights),
            **objective_options(config.policy_objective),
            threshold=float("inf") if config.rollout_is_threshold is None else config.rollout_is_threshold,
            kl_coef=config.kl_coef,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
        )
        return rows, sums

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:5]

    @property
    def options(self) -> tuple:
        """The fields after the tensors, from objective on."""
        return self[5:]

    def flat(self) -> LossRows:
        """The same record with tensors [T] in place of [B, L]."""
        return type(self)(*(value.flatten() if isinstance(value, Tensor) else value for value in self))


def _row_values(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()
