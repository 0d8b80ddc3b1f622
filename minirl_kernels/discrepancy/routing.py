"""Compares the experts that the two engines choose for the same tokens. The routers are watched, not changed."""

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
    """Agreement of the two engines' experts in one MoE layer."""

    router: str
    layer: int
    """Number of the decoder layer. It is the router's number if layers have several routers, or a router is outside."""
    equal_fraction: float
    """Fraction of the tokens that both engines send to the same set of experts."""
    overlap: float
    """Mean fraction of a token's experts that both engines chose."""


class RoutingComparison:
    """Sums the agreement over batches. For each batch, run mu in `recording_mu` and pi in `recording_pi`, then `add`.

    mu: None if there is no module to watch; `add` then needs the experts that mu returned.
    Raises ValueError for a model without known routers, and for two models with different routers.
    """

    def __init__(self, mu: nn.Module | None, pi: nn.Module):
        self._mu, self._pi = mu, pi
        self._names = [router.name for router in routers(pi)]
        if mu is not None and [router.name for router in routers(mu)] != self._names:
            raise ValueError("the two engines have different routers")
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
        """Add the choices that were recorded since the last call.

        spans: [rows, 2], first place and end of the tokens to compare. experts: [rows, L], the experts that mu
        returned, needed if mu was not watched. Raises ValueError if they have another number of layers than pi.
        """
        if not self.watches_mu:
            self._chosen["mu"] = self._returned(experts)
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

    def _returned(self, experts: RoutedExperts) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """{router: [(keys, expert ids)]} of the experts that mu returned."""
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
