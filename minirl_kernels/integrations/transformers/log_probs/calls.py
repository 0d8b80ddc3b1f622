"""The call that a thread is in: a head finds there whether it keeps its input, and nothing of a call is on a module."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn


class Call:
    """One forward in which a head keeps its input.

    head: the module that keeps it; other heads are left alone. owner: the module whose hooks took `arguments`.
    new: the fields that the output got.
    autocast_dtype, grad_enabled: what the head is called in; a forward may set its own (that of accelerate does).
    """

    def __init__(self, head: nn.Module, owner: nn.Module | None = None, arguments: dict[str, Any] | None = None):
        self.head, self.owner, self.arguments = head, owner, arguments
        self.hidden: Tensor | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.grad_enabled = True
        self.new: dict[str, Any] | None = None
        self.outer = current_call()

    def keep(self, hidden: Tensor) -> Tensor:
        """The output of the head, which is not computed: an empty tensor."""
        if self.hidden is not None:
            raise ValueError("the model calls its output embeddings more than once in a forward: it must be once")
        self.hidden = hidden
        self.grad_enabled = torch.is_grad_enabled()
        device = hidden.device.type
        self.autocast_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return hidden.new_empty(0, *hidden.shape[1:-1], self.head.out_features)


class _State:
    def __init__(self):
        self.call: Call | None = None


class _Threads(threading.local):
    # torch.compile loses an assignment to an attribute of a threading.local itself, and keeps one to this object
    def __init__(self):
        self.state = _State()


_THREADS = _Threads()


def current_call() -> Call | None:
    return _THREADS.state.call


def set_call(call: Call | None) -> None:
    _THREADS.state.call = call
