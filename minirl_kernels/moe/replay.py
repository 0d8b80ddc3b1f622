"""record_routing and replay_routing: a model's routers choose by moe_routing, whose choice is noted or prescribed.

Both go through a forward hook on each router, which puts moe_routing's weights and experts in place of the router's
own. A recompute of gradient checkpointing runs inside a backward; autograd's sequence numbers, which it gives to the
nodes of a graph as they are made, say which forward it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.moe_routing import Routing, moe_routing
from .routed_experts import RoutedExperts, compact_dtype
from .routers import Router, routers

# which context each router is in, by name
_ACTIVE: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Route naturally, and note the experts of every token and layer in the RoutingRecord that it yields.

    model: a transformers mixture-of-experts model. Inside, its routers choose and weigh by moe_routing (ties to the
        lower id), so that a replay of the record under the same weights gives the same bits; transformers' own
        routers differ from it by roundings.
    Several forwards may run inside (`generate`, say); a recompute of gradient checkpointing is not noted again.
    Raises ValueError that names the module where a router cannot be replayed; RuntimeError where routers are in
    another of these contexts, a forward leaves a router out, or a recompute comes after the context has ended.
    """
    with _routed("record_routing", RoutingRecord(routers(model))) as record:
        yield record


@contextmanager
def replay_routing(model: nn.Module, routed_experts: RoutedExperts, *, check: bool = False) -> Iterator[RoutingReplay]:
    """Send every token to the experts that were recorded, with weights from the router logits of this forward.

    model: as in record_routing. routed_experts: of the model's MoE layers; its tokens, flattened, are the rows of the
        forward, [B * L]. Tokens that are not valid in a layer route naturally there. Moved to each router's device.
    check: as in moe_routing, for a GPU.
    Covers one forward and its backward, both inside: a recompute of gradient checkpointing replays the same rows.
    Yields RoutingReplay, what the replay made of them. Raises what record_routing raises; ValueError where layers,
    experts or tokens are not the model's; RuntimeError for a second forward.
    """
    if not isinstance(routed_experts, RoutedExperts):
        raise TypeError(f"routed_experts is a {type(routed_experts).__name__}: it must be RoutedExperts")
    with _routed("replay_routing", RoutingReplay(routers(model), routed_experts, check)) as replay:
        yield replay


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

    def _route(self, index: int, logits: Tensor, is_recompute: bool) -> Routing:
        router = self._routers[index]
        routing = moe_routing(logits, router.top_k, **router.options())
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

    def _stacked(self, field: str) -> Tensor:
        for router, routing in zip(self._routers, self._routings, strict=True):
            if routing is None:
                raise RuntimeError(
                    f"replay_routing saw no forward through {router.name}: run the model inside it first"
                )
        device = self._routings[0].mass.device
        return torch.stack([getattr(routing, field).to(device) for routing in self._routings], 1)

    def _route(self, index: int, logits: Tensor, is_recompute: bool) -> Routing:
        router = self._routers[index]
        if not is_recompute and self._routings[index] is not None:
            raise RuntimeError(
                f"{router.name} runs a second time: one replay_routing covers one forward and its backward"
            )
        ids, valid = self._routed_experts.layer(index)
        if len(ids) != len(logits):
            raise ValueError(f"routed_experts has {len(ids)} tokens: {router.name} was given {len(logits)}")
        ids, valid = ids.to(logits.device), valid.to(logits.device)
        routing = moe_routing(
            logits, router.top_k, routed_experts=ids, valid=valid, check=self._check, **router.options()
        )
        if not is_recompute:
            # the others would keep the graph, and 16 K bytes of each token
            self._routings[index] = routing._replace(weights=None, experts=None, natural_experts=None)
        return routing


class _Hooks:
    """The hooks of one context on the model's routers, and their count of forwards and recomputes."""

    def __init__(self, name: str, found: list[Router], context: RoutingRecord | RoutingReplay):
        self._name, self._routers, self._context = name, found, context
        self._ran = [False] * len(found)
        self._pending = [0] * len(found)  # forwards that a checkpoint may yet compute again
        self._start, self._end = torch.autograd._get_sequence_nr(), None
        self._handles = [
            router.module.register_forward_hook(partial(self._after, index)) for index, router in enumerate(found)
        ]

    def end(self, *, failed: bool) -> None:
        """Take the hooks off, but for those of routers whose recompute may come after its context."""
        self._end = torch.autograd._get_sequence_nr()
        for pending, handle in zip(self._pending, self._handles, strict=True):
            if failed or pending <= 0 or self._start == self._end:
                handle.remove()
        left_out = [router.name for router, ran in zip(self._routers, self._ran, strict=True) if not ran]
        if not failed and any(self._ran) and left_out:
            raise RuntimeError(
                f"{self._name}: the forward left out {left_out[0]}: every router must be called as a module"
            )

    def _after(self, index: int, module: nn.Module, _, output: tuple[Tensor, ...]):
        node = _node_in_backward()
        is_recompute = node is not None
        if self._end is not None:
            if is_recompute and self._start <= node < self._end:
                raise RuntimeError(
                    f"{self._routers[index].name} is computed again by gradient checkpointing after its {self._name} "
                    "has ended, and would route otherwise: run the backward inside it"
                )
            return None
        if is_recompute and node < self._start:
            raise RuntimeError(
                f"{self._routers[index].name} is computed again inside a {self._name} that its forward was not in: "
                "run that backward outside"
            )
        if is_recompute:
            self._pending[index] -= 1
        elif _may_be_checkpointed():
            self._pending[index] += 1
        logits, weights, _ = output
        routing = self._context._route(index, logits, is_recompute)
        self._ran[index] = True
        return logits, routing.weights.to(weights.dtype), routing.experts


@contextmanager
def _routed(name, context):
    found = context._routers
    for router in found:
        if router.module in _ACTIVE:
            raise RuntimeError(f"{router.name} is inside {_ACTIVE[router.module]} already: {name} must not be nested")
    hooks = _Hooks(name, found, context)
    _ACTIVE.update((router.module, name) for router in found)
    failed = True
    try:
        yield context
        failed = False
    finally:
        for router in found:
            _ACTIVE.pop(router.module, None)
        hooks.end(failed=failed)


def _node_in_backward() -> int | None:
    """The sequence number of the node that a running backward is at, -1 between nodes; None where none is running."""
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()


def _may_be_checkpointed() -> bool:
    """The two kinds of checkpointing run a forward without gradients, or with hooks that let go of saved tensors."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _check_uniform(found: list[Router]) -> None:
    first = found[0]
    for router in found:
        if (router.top_k, router.num_experts) != (first.top_k, first.num_experts):
            raise ValueError(
                f"model has {router.top_k} of {router.num_experts} experts in {router.name} and {first.top_k} of "
                f"{first.num_experts} in {first.name}: they must be the same in every layer"
            )
