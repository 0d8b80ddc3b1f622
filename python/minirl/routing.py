"""Measures how many replayed experts agree with the natural choices of the policy's routers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from minirl_kernels.moe.replay import RoutingReplay

from .batch import Batch


@dataclass(frozen=True)
class Agreement:
    """Agreement of replayed and natural experts in a forward, over loss tokens with recorded experts."""

    total: Tensor | None = None  # total and count: [layers]; None if nothing was replayed
    count: Tensor | None = None

    @classmethod
    def of(cls, replay: RoutingReplay | None, micro: Batch) -> Agreement:
        if replay is None:
            return cls()
        counts = micro.routed_experts.valid.flatten(0, 1) & micro.loss_mask.flatten()[:, None]
        return cls(replay.agreement.where(counts, 0.0).sum(0), counts.sum(0))

    def __add__(self, other: Agreement) -> Agreement:
        if self.total is None or other.total is None:
            return other if self.total is None else self
        return Agreement(self.total + other.total, self.count + other.count)

    def compute(self, name: str) -> dict[str, float]:
        """The mean of each MoE layer, numbered from 0; empty if nothing was replayed."""
        means = [] if self.total is None else (self.total / self.count).tolist()
        return {f"{name}_layer_{layer}": mean for layer, mean in enumerate(means)}
