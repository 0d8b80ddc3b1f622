"""Records which modules of a model run, with their inputs and outputs, so that an error can name a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class Trace:
    """calls: {module name: (inputs, outputs)} of forwards over tokens [B, L], one tensor [B, L, ...] per call.

    Modules are in the order in which they first return. The tensors stay in their autograd graphs.
    """

    calls: dict[str, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)


@contextmanager
def traced(model: nn.Module) -> Iterator[Trace]:
    """Yields a Trace of the forwards inside the block."""
    trace = Trace()

    def note(name, module, args, kwargs, output):
        inputs, outputs = trace.calls.setdefault(name, ([], []))
        inputs.extend(_token_tensors((args, kwargs))[:1])
        outputs.extend(_token_tensors(output)[:1])

    handles = [
        module.register_forward_hook(partial(note, name), with_kwargs=True) for name, module in model.named_modules()
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def running(model: nn.Module) -> Iterator[list[str]]:
    """Yields the names of the running modules, outermost first. An exception comes from the last one."""
    names, handles = [], []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: names.append(name)))
        handles.append(module.register_forward_hook(lambda *_: (names.pop(), None)[1]))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def in_words(model: nn.Module, name: str) -> str:
    """Name and class of a module, for messages."""
    return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"


def over_tokens(parts: list[Tensor], batch: int, length: int) -> Tensor | None:
    """The tensors of one module's calls, joined to [batch, length, ...]; None if they do not have these sizes."""
    if not parts or any(part.shape[0] != batch or part.shape[2:] != parts[0].shape[2:] for part in parts):
        return None
    return torch.cat(parts, 1) if sum(part.shape[1] for part in parts) == length else None


def _token_tensors(values) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 2]
