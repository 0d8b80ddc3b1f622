"""record_routing and replay_routing: contexts that record the experts of a forward, or replay recorded experts.

Each places a forward hook on every router (hooks.py). The hook replaces the router's weights and experts by the result
of moe_routing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..common.records import with_values
from ..ops.moe_routing import Routing, moe_routing
from .hooks import hooked
from .routed_experts import RoutedExperts, compact_dtype
from .routers import Router, routers


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Route naturally, and record the experts of every token and layer. Yields the RoutingRecord.

    model: a mixture-of-experts model of transformers. Inside the context its routers compute by moe_routing, where ties
        go to the lower expert id. So a replay of the record with the same model weights gives the same bits. The
        routers of transformers differ from moe_routing by rounding.
    Several forwards may run inside, as `generate` does. A recompute of gradient checkpointing is not recorded again.
    The context holds for the thread that enters it. Functions compiled by torch.compile do not run hooks, so they run
    uncompiled while a context is open in any thread.

    Raises ValueError for a router that cannot be replayed; the message names the module.
    Raises TypeError for a router whose output has an unknown form.
    Raises ImportError for a transformers older than 5.18.
    Raises RuntimeError
        inside a compiled function, or inside another of these contexts on the same routers;
        if a forward leaves out a router, or the model runs in other threads only;
        if a recompute runs after the context has ended, or would run compiled code.
    """
    found = routers(model)
    record = RoutingRecord(found)
    with hooked("record_routing", model, found, record):
        yield record


@contextmanager
def replay_routing(model: nn.Module, routed_experts: RoutedExperts, *, check: bool = False) -> Iterator[RoutingReplay]:
    """Send every token to its recorded experts, with expert weights from the router logits of this forward.

    model: as in record_routing.
    routed_experts: the experts of the model's MoE layers. Its tokens, flattened, are the rows of the forward, [B * L].
        A token that is not valid in a layer routes naturally there. The tensors are moved to each router's device.
    check: as in moe_routing, for a GPU.
    The context covers one forward and its backward, and both must run inside. A recompute of gradient checkpointing
    replays the same rows.

    Yields a RoutingReplay, which compares the replayed experts with the natural ones.
    Raises what record_routing raises. Raises ValueError if the layers, experts or tokens do not match the model.
    Raises RuntimeError for a second forward, and at the end if no forward ran. A forward of a copy or of an exported
    program of the model does not count.
    """
    if not isinstance(routed_experts, RoutedExperts):
        raise TypeError(f"routed_experts is a {type(routed_experts).__name__}: it must be RoutedExperts")
    found = routers(model)
    replay = RoutingReplay(found, routed_experts, check)
    with hooked("replay_routing", model, found, replay):
        yield replay
    replay.check_used()


class RoutingRecord:
    """Recorded experts. forwards[i][layer] is [T, K], uint8 for a router of up to 256 experts, uint16 for more."""

    def __init__(self, found: list[Router]):
        self._routers = found
        _check_uniform(found)
        self.forwards: list[list[Tensor | None]] = []

    def sequences(self, batch_size: int) -> RoutedExperts:
        """The experts of all forwards, joined along L: [B, L, layers, K]. For `generate`: the prompt, then each token.

        Raises RuntimeError if no forward ran, or one left out a router. Raises ValueError if batch_size does not divide
        the rows.
        """
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
        """The experts [T, layers, K] of a single forward. Raises RuntimeError if another number of forwards ran."""
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
        """See hooks.Context."""
        routing = moe_routing(logits, self._routers[index].top_k, **options)
        if not is_recompute:
            self._note(index, routing)
        return routing


class RoutingReplay:
    """Compares the replayed routing with the natural routing of the same forward, per token and MoE layer."""

    def __init__(self, found: list[Router], routed_experts: RoutedExperts, check: bool):
        self._routers, self._routed_experts, self._check = found, routed_experts, check
        self._routings: list[Routing | None] = [None] * len(found)
        if routed_experts.num_layers != len(found):
            raise ValueError(
                f"routed_experts has {routed_experts.num_layers} layers: the model has {len(found)} routers, "
                f"{found[0].name} to {found[-1].name}"
            )
        for router in found:
            for quantity, given, own in (
                ("experts per token", routed_experts.top_k, router.top_k),
                ("experts to choose from", routed_experts.num_experts, router.num_experts),
            ):
                if given != own:
                    raise ValueError(f"routed_experts has {given} {quantity}: {router.name} has {own}")

    @property
    def agreement(self) -> Tensor:
        """[T, layers] float32: `Routing.agreement` of each layer."""
        return self._stacked("agreement")

    @property
    def mass(self) -> Tensor:
        """[T, layers] float32: `Routing.mass` of each layer."""
        return self._stacked("mass")

    @property
    def margin(self) -> Tensor:
        """[T, layers] float32: `Routing.margin` of each layer."""
        return self._stacked("margin")

    def check_used(self) -> None:
        """Raises RuntimeError unless every router ran."""
        for router, routing in zip(self._routers, self._routings, strict=True):
            if routing is None:
                raise RuntimeError(
                    f"replay_routing saw no forward through {router.name}: run the model inside it first; a copy or an "
                    "exported program of it does not count"
                )

    def _stacked(self, field: str) -> Tensor:
        self.check_used()
        device = self._routings[0].mass.device
        return torch.stack([getattr(routing, field).to(device) for routing in self._routings], 1)

    def route(self, index: int, logits: Tensor, options: dict[str, Any], *, is_recompute: bool) -> Routing:
        """See hooks.Context."""
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
            # The other fields would keep the autograd graph alive, and take 16 K bytes per token.
            self._routings[index] = with_values(routing, weights=None, experts=None, natural_experts=None)
        return routing


def _check_uniform(found: list[Router]) -> None:
    first = found[0]
    for router in found:
        if (router.top_k, router.num_experts) != (first.top_k, first.num_experts):
            raise ValueError(
                f"model has {router.top_k} of {router.num_experts} experts in {router.name} and {first.top_k} of "
                f"{first.num_experts} in {first.name}: they must be the same in every layer"
            )
