"""The experts that each engine chose for the same tokens. It only looks: the routers stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..moe import RoutedExperts
from ..moe.routers import routers
from .forwards import STRIDE, Forward, common_tokens, watched
from .layers import Layers


@dataclass(frozen=True)
class LayerAgreement:
    """Of mu's experts with pi's in one MoE layer."""

    router: str
    layer: int
    """The number of its decoder layer; of the router, where a layer has several or a router has none."""
    equal_fraction: float
    """Of the tokens, those that both engines send to the same experts."""
    overlap: float
    """Mean share of a token's experts that are the same in both."""


class RoutingComparison:
    """Gathers agreement over batches: mu runs inside `recording_mu`, pi inside `recording_pi`, then `add`.

    mu: None where there is no module to watch: its experts are then those that it says. Raises ValueError where a model
    has no routers that are known, or the two have not the same.
    """

    def __init__(self, mu: nn.Module | None, pi: nn.Module):
        self._mu, self._pi = mu, pi
        self._names = [router.name for router in routers(pi)]
        if mu is not None and [router.name for router in routers(mu)] != self._names:
            raise ValueError("the two engines have not the same routers")
        layers = Layers.of(pi)
        numbers = [layers.number(name) for name in self._names]
        one_each = None not in numbers and len(set(numbers)) == len(numbers)
        self._numbers = numbers if one_each else list(range(len(numbers)))
        self._chosen: dict[str, dict[str, list[tuple[Tensor, Tensor]]]] = {}
        self._totals = torch.zeros(len(self._names), 3, dtype=torch.float64)  # equal, overlap, tokens

    @property
    def watches_mu(self) -> bool:
        return self._mu is not None

    @contextmanager
    def recording_mu(self) -> Iterator[None]:
        if not self.watches_mu:
            yield
            return
        with self._recording("mu", self._mu):
            yield

    @contextmanager
    def recording_pi(self) -> Iterator[None]:
        with self._recording("pi", self._pi):
            yield

    def add(self, spans: Tensor, experts: RoutedExperts | None) -> None:
        """Take in what was recorded since the last time.

        spans: [rows, 2], first place and end in each sequence. experts: [rows, L] as mu says, needed where it was not
        watched. Raises ValueError for another number of layers.
        """
        if not self.watches_mu:
            self._chosen["mu"] = self._said(experts)
        for index, name in enumerate(self._names):
            mu_keys, mu = (torch.cat(parts) for parts in zip(*self._chosen["mu"][name], strict=True))
            pi_keys, pi = (torch.cat(parts) for parts in zip(*self._chosen["pi"][name], strict=True))
            in_mu, in_pi = common_tokens(mu_keys, pi_keys, spans)
            shared = (mu[in_mu][:, :, None] == pi[in_pi][:, None, :]).any(2).double().mean(1)
            self._totals[index] += torch.stack(
                [(shared == 1).double().sum(), shared.sum(), shared.new_tensor(len(shared))]
            )
        self._chosen.clear()

    def layers(self) -> list[LayerAgreement]:
        equal, overlap, tokens = self._totals.unbind(1)
        values = torch.stack([equal / tokens, overlap / tokens], 1).tolist()
        return [
            LayerAgreement(name, number, *pair)
            for name, number, pair in zip(self._names, self._numbers, values, strict=True)
        ]

    def _said(self, experts: RoutedExperts) -> dict[str, list[tuple[Tensor, Tensor]]]:
        if experts.num_layers != len(self._names):
            raise ValueError(f"mu gave routed_experts of {experts.num_layers} layers, and pi has {len(self._names)}")
        chosen = {}
        for index, name in enumerate(self._names):
            rows, places = experts.valid[:, :, index].nonzero(as_tuple=True)
            chosen[name] = [(rows * STRIDE + places, experts.experts[rows, places, index].long())]
        return chosen

    @contextmanager
    def _recording(self, engine: str, model: nn.Module) -> Iterator[None]:
        found = {router.name: router for router in routers(model)}
        chosen = self._chosen[engine] = {name: [] for name in self._names}

        def after(forward: Forward, name: str, _, output: tuple[Tensor, ...]) -> None:
            chosen[name].append(forward.per_token(found[name].experts(output), len(forward.tokens)))

        with watched(model, names=self._names, after=after):
            yield
