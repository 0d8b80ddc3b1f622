"""Forward hooks through which a routing context chooses the experts of a model's routers.

The hooks act in the thread that entered the context, and in autograd's threads that run its backward.

Code that torch.compile made before the hooks does not call them. So compiled functions run uncompiled inside a context,
and a forward whose routers did not run raises an error.

Gradient checkpointing runs a part of the forward again inside the backward (a recompute). Autograd numbers the nodes of
a graph in the order in which they are made. A recompute runs inside a node of its forward. If the node's number is
between the first and the last number of a context, the forward ran inside this context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..common.uncompiled import hold_uncompiled, release_uncompiled
from ..ops.moe_routing import Routing
from .routers import Router

# Key of the contexts in torch's thread-local state, which autograd's threads inherit from the caller of backward.
_KEY = "minirl_kernels.routing"


class Context(Protocol):
    """Chooses the experts for the tokens of router `index`. options: keyword arguments of moe_routing."""

    def route(self, index: int, logits: Tensor, options: dict, *, is_recompute: bool) -> Routing: ...


@contextmanager
def hooked(name: str, model: nn.Module, found: list[Router], context: Context) -> Iterator[None]:
    """Inside the block, `context` chooses the experts of all routers in `found`, which are the routers of `model`.

    name: the public function's name, for messages. Raises RuntimeError for the cases listed in record_routing.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name} is entered inside a compiled function: it must be entered outside, around the call")
    for other in _thread_contexts():
        other.refuse_nesting(name, found)
    hold_uncompiled()
    try:
        hooks = _Hooks(name, model, found, context)
        _set_thread_contexts((*_thread_contexts(), hooks))
        failed = True
        try:
            yield
            failed = False
        finally:
            _set_thread_contexts(tuple(one for one in _thread_contexts() if one is not hooks))
            hooks.end(failed=failed)
    finally:
        release_uncompiled()


class _Running(NamedTuple):
    """A forward, not yet returned, of a router or of a module that contains routers."""

    runs_before: list[int]  # _Hooks._runs when the forward began
    keeps_graph: bool  # whether a backward may follow, which may recompute the forward


class _Hooks:
    """The hooks of one context. They choose the experts, and raise an error where a router would choose others."""

    def __init__(self, name: str, model: nn.Module, found: list[Router], context: Context):
        self._name, self._routers, self._context = name, found, context
        self._runs = [0] * len(found)  # per router: forwards and recomputes so far
        self._pending = [0] * len(found)  # per router: forwards that checkpointing may still recompute
        self._running: dict[str, _Running] = {}  # by module path
        self._in_another_thread = False  # whether a module ran in a thread outside the context
        # numbers of the next autograd node when the context begins and when it ends
        self._start, self._end = torch.autograd._get_sequence_nr(), None
        self._handles = [
            [module.register_forward_hook(partial(self._after, index)) for module in router.modules]
            for index, router in enumerate(found)
        ]
        self._around = _modules_around(model, found)
        self._around_handles = [
            handle
            for path, (module, inner) in self._around.items()
            for handle in (
                module.register_forward_pre_hook(partial(self._begin_forward, path)),
                module.register_forward_hook(partial(self._end_forward, path, inner)),
            )
        ]

    def refuse_nesting(self, name: str, found: list[Router]) -> None:
        """Raise RuntimeError if this context holds one of the routers `found`, which `name` would hook."""
        mine = {module for router in self._routers for module in router.modules}
        for router in found:
            if not mine.isdisjoint(router.modules):
                raise RuntimeError(f"{router.name} is inside {self._name} already: {name} must not be nested")

    def end(self, *, failed: bool) -> None:
        """Remove the hooks. A router whose recompute may still come keeps its hooks, which then raise an error."""
        self._end = torch.autograd._get_sequence_nr()
        for handle in self._around_handles:
            handle.remove()
        compiled = next((path for path, (module, _) in self._around.items() if _is_compiled(module)), None)
        refused = compiled is not None and not failed and any(pending > 0 for pending in self._pending)
        for pending, handles in zip(self._pending, self._handles, strict=True):
            if failed or refused or pending <= 0:
                for handle in handles:
                    handle.remove()
        if failed:
            return
        if refused:
            raise RuntimeError(
                f"{self._name} ends before the backward of a forward under gradient checkpointing, whose recompute "
                f"would run the compiled {compiled or 'model'} with other routes: run the backward inside it"
            )
        if any(self._runs):
            self._check_all_ran(range(len(self._routers)), [0] * len(self._routers))
        elif self._in_another_thread:
            raise RuntimeError(f"{self._name}: the model ran in another thread only: enter it in that thread")

    def _check_all_ran(self, indices, before: list[int]) -> None:
        for index in indices:
            if self._runs[index] == before[index]:
                raise RuntimeError(
                    f"{self._name}: the forward left out {self._routers[index].name}: every router must be called as a "
                    "module, and not from a graph that was captured or exported before"
                )

    def _begin_forward(self, path: str, *_) -> None:
        if not self._is_active():
            return
        self._running[path] = _Running(list(self._runs), torch.is_grad_enabled() or _inside_autograd_function())

    def _end_forward(self, path: str, inner: list[int], *_) -> None:
        if self._is_active():
            self._check_all_ran(inner, self._running.pop(path).runs_before)

    def _outermost(self, router: Router) -> _Running:
        """The outermost running forward that contains the router."""
        return next(self._running[path] for path in _paths(router) if path in self._running)

    def _is_active(self) -> bool:
        """Whether this thread is inside the context. If not, this is noted, for the error of `end`."""
        if any(one is self for one in _thread_contexts()):
            return True
        self._in_another_thread = True
        return False

    def _after(self, index: int, module: nn.Module, inputs: tuple, output):
        """The forward hook of router `index`. Returns the output with the context's experts; None keeps the output."""
        router = self._routers[index]
        if torch.compiler.is_compiling():
            if self._end is None:
                raise RuntimeError(f"{router.name} is traced inside {self._name}: trace or export the model outside")
            return None
        node = _node_in_backward()
        is_recompute = node is not None
        if self._end is not None:
            if is_recompute and self._start <= node < self._end:
                raise RuntimeError(
                    f"{router.name} is computed again by gradient checkpointing after its {self._name} "
                    "has ended, and would choose other experts: run the backward inside it"
                )
            return None
        if not self._is_active():
            return None
        if is_recompute and node < self._start:
            raise RuntimeError(
                f"{router.name} is computed again inside a {self._name}, but its forward ran outside: "
                "run the backward outside too"
            )
        if is_recompute:
            self._pending[index] -= 1
        elif self._outermost(router).keeps_graph and _may_be_checkpointed():
            self._pending[index] += 1
        options = router.options(module, inputs)
        routing = self._context.route(index, router.logits(output), options, is_recompute=is_recompute)
        self._runs[index] += 1
        return router.replaced(output, routing)


def _thread_contexts() -> tuple[_Hooks, ...]:
    return torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else ()


def _set_thread_contexts(contexts: tuple[_Hooks, ...]) -> None:
    torch._C._stash_obj_in_tls(_KEY, contexts)


def _modules_around(model: nn.Module, found: list[Router]) -> dict[str, tuple[nn.Module, list[int]]]:
    """{path: (module, indices of its routers)} of each router and each module that contains one."""
    modules = dict(model.named_modules())
    around: dict[str, tuple[nn.Module, list[int]]] = {}
    for index, router in enumerate(found):
        for path in _paths(router):
            around.setdefault(path, (modules[path], []))[1].append(index)
    return around


def _paths(router: Router) -> list[str]:
    """Paths of the router and of all modules that contain it, outermost first."""
    parts = router.name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _node_in_backward() -> int | None:
    """Sequence number of the autograd node that is running: None outside a backward.

    Between two nodes of a backward it is -1, which is before every context.
    """
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()


def _may_be_checkpointed() -> bool:
    """Whether this forward may run under gradient checkpointing.

    Reentrant checkpointing runs it inside an autograd.Function, the other kind with hooks for saved tensors.
    """
    if torch.is_grad_enabled():
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return _inside_autograd_function()


def _inside_autograd_function() -> bool:
    """Whether the code runs in the forward of an autograd.Function.

    torch switches forward-mode gradients off there. no_grad leaves them on; inference_mode is excluded by its own flag.
    """
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
