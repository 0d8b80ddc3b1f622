"""record_routing and replay_routing: a model's routers choose by moe_routing, whose choice is noted or prescribed.

Both go through a forward hook on each router (hooks.py), which puts moe_routing's weights and experts in place of the
router's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.moe_routing import Routing, moe_routing
from .hooks import hooked
from .routed_experts import RoutedExperts, compact_dtype
from .routers import Router, routers


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Route naturally, and note the experts of every token and layer in the RoutingRecord that it yields.

    model: a transformers mixture-of-experts model. Inside, its routers choose and weigh by moe_routing (ties to the
        lower id), so that a replay of the record under the same weights gives the same bits; transformers' own
        routers differ from it by roundings.
    Several forwards may run inside (`generate`, say); a recompute of gradient checkpointing is not noted again.
    Holds for the thread that enters it. Functions that were compiled by torch.compile, whose code has no hooks, run
    uncompiled while a context is open in any thread.
    Raises ValueError that names the module where a router cannot be replayed, TypeError where it returns another form;
    ImportError for a transformers older than 5.18; RuntimeError inside a compiled function, where routers are in
    another of these contexts, where a forward leaves a router out or the model runs in another thread only, and where
    a recompute comes after the context has ended, or would come of compiled code.
    """
    found = routers(model)
    record = RoutingRecord(found)
    with hooked("record_routing", model, found, record):
        yield record


@contextmanager
def replay_routing(model: nn.Module, routed_experts: RoutedExperts, *, check: bool = False) -> Iterator[RoutingReplay]:
    """Send every token to the experts that were recorded, with weights from the router logits of this forward.

    model: as in record_routing. routed_experts: of the model's MoE layers; its tokens, flattened, are the rows of the
        forward, [B * L]. Tokens that are not valid in a layer route naturally there. Moved to each router's device.
    check: as in moe_routing, for a GPU.
    Covers one forward and its backward, both inside: a recompute of gradient checkpointing replays the same rows.
    Yields RoutingReplay, what the replay made of them. Raises what record_routing raises; ValueError where layers,
    experts or tokens are not the model's; RuntimeError for a second forward, and at its end for none: a copy or an
    exported program of the model is not the model.
    """
    if not isinstance(routed_experts, RoutedExperts):
        raise TypeError(f"routed_experts is a {type(routed_experts).__name__}: it must be RoutedExperts")
    found = routers(model)
    replay = RoutingReplay(found, routed_experts, check)
    with hooked("replay_routing", model, found, replay):
        yield replay
    replay.check_used()


class RoutingRecord:
    """What was recorded: forwards[i][layer] is [T, K], uint8 where a router has up to 256 experts, else uint16."""

    def __init__(self, found: list[Router]):
        self._routers = found
        _check_uniform(found)
        self.forwards: list[list[Tensor | None]] = []

    def sequences(self, batch_size: int) -> RoutedExperts:
        """[B, L, layers, K] of all forwards, one after another along L: a prompt's and then each new token's, say."""
        self._check_complete()
        parts = []
        for number, layers in enumerate(self.forwards):
            rows = torch.stack(layers, 1)
            if len(rows) % batch_size:
                raise ValueError(f"batch_size is {batch_size}: it must divide the {len(rows)} rows of forward {number}")
            parts.append(rows.unflatten(0, (batch_size, -1)))
        return self._as_valid(torch.cat(parts, 1))

    @property
    def routed_experts(self) -> RoutedExperts:
        """[T, layers, K] of the one forward that ran."""
        self._check_complete()
        if len(self.forwards) != 1:
            raise RuntimeError(f"record_routing saw {len(self.forwards)} forwards: use sequences(batch_size)")
        return self._as_valid(torch.stack(self.forwards[0], 1))

    def _as_valid(self, experts: Tensor) -> RoutedExperts:
        valid = torch.ones(experts.shape[:-1], dtype=torch.bool, device=experts.device)
        return RoutedExperts(experts, valid, self._routers[0].num_experts)

    def _check_complete(self) -> None:
        if not self.forwards:
            raise RuntimeError("record_routing saw no forward: run the model inside it first")
        missing = [router.name for router, ids in zip(self._routers, self.forwards[-1], strict=True) if ids is None]
        if missing:
            raise RuntimeError(f"record_routing saw a forward that left out {missing[0]}")

    def _note(self, index: int, routing: Routing) -> None:
        if not self.forwards or self.forwards[-1][index] is not None:
            if self.forwards:
                self._check_complete()
            self.forwards.append([None] * len(self._routers))
        self.forwards[-1][index] = routing.experts.to(compact_dtype(self._routers[index].num_experts))

    def route(self, index: int, logits: Tensor, options: dict[str, Any], *, is_recompute: bool) -> Routing:
        """As hooks.Context has it."""
        routing = moe_routing(logits, self._routers[index].top_k, **options)
        if not is_recompute:
            self._note(index, routing)
        return routing


class RoutingReplay:
    """How the replayed routing compares with the natural one of the same forward."""

    def __init__(self, found: list[Router], routed_experts: RoutedExperts, check: bool):
        self._routers, self._routed_experts, self._check = found, routed_experts, check
        self._routings: list[Routing | None] = [None] * len(found)
        if routed_experts.num_layers != len(found):
            raise ValueError(
                f"routed_experts has {routed_experts.num_layers} layers: the model has {len(found)} routers, "
                f"{found[0].name} to {found[-1].name}"
            )
        for router in found:
            for what, given, own in (
                ("experts per token", routed_experts.top_k, router.top_k),
                ("experts to choose from", routed_experts.num_experts, router.num_experts),
            ):
                if given != own:
                    raise ValueError(f"routed_experts has {given} {what}: {router.name} has {own}")

    @property
    def agreement(self) -> Tensor:
        """[T, layers] float32: as in Routing, and so are the others."""
        return self._stacked("agreement")

    @property
    def mass(self) -> Tensor:
        return self._stacked("mass")

    @property
    def margin(self) -> Tensor:
        return self._stacked("margin")

    def check_used(self) -> None:
        """Raises RuntimeError unless every router has routed."""
        for router, routing in zip(self._routers, self._routings, strict=True):
            if routing is None:
                raise RuntimeError(
                    f"replay_routing saw no forward through {router.name}: run the model inside it first, itself and "
                    "no copy or exported program of it"
                )

    def _stacked(self, field: str) -> Tensor:
        self.check_used()
        device = self._routings[0].mass.device
        return torch.stack([getattr(routing, field).to(device) for routing in self._routings], 1)

    def route(self, index: int, logits: Tensor, options: dict[str, Any], *, is_recompute: bool) -> Routing:
        """As hooks.Context has it."""
        router = self._routers[index]
        if not is_recompute and self._routings[index] is not None:
            raise RuntimeError(
                f"{router.name} runs a second time: one replay_routing covers one forward and its backward"
            )
        ids, valid = self._routed_experts.layer(index)
        if len(ids) != len(logits):
            raise ValueError(f"routed_experts has {len(ids)} tokens: {router.name} was given {len(logits)}")
        ids, valid = ids.to(logits.device), valid.to(logits.device)
        routing = moe_routing(logits, router.top_k, routed_experts=ids, valid=valid, check=self._check, **options)
        if not is_recompute:
            # the others would keep the graph, and 16 K bytes of each token
            self._routings[index] = routing._replace(weights=None, experts=None, natural_experts=None)
        return routing


def _check_uniform(found: list[Router]) -> None:
    first = found[0]
    for router in found:
        if (router.top_k, router.num_experts) != (first.top_k, first.num_experts):
            raise ValueError(
                f"model has {router.top_k} of {router.num_experts} experts in {router.name} and {first.top_k} of "
                f"{first.num_experts} in {first.name}: they must be the same in every layer"
            )
