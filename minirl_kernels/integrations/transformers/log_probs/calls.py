"""The state of one call of an enabled model. It is kept per thread, so that modules hold no state of a call."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn


class Call:
    """One forward in which a head stores its input instead of computing logits.

    head: the module that stores its input; other heads are not affected.
    owner: the module whose hooks took `arguments`. new: the fields added to the output.
    autocast_dtype, grad_enabled: the state at the head. A forward may set its own, as accelerate's does.
    """

    def __init__(self, head: nn.Module, owner: nn.Module | None = None, arguments: dict[str, Any] | None = None):
        self.head, self.owner, self.arguments = head, owner, arguments
        self.hidden: Tensor | None = None
        self.autocast_dtype: torch.dtype | None = None
        self.grad_enabled = True
        self.new: dict[str, Any] | None = None
        self.outer = current_call()

    def keep(self, hidden: Tensor) -> Tensor:
        """Store the head's input. Returns an empty tensor in place of the logits."""
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
    # torch.compile drops an assignment to an attribute of a threading.local, but not to an object inside it
    def __init__(self):
        self.state = _State()


_THREADS = _Threads()


def current_call() -> Call | None:
    return _THREADS.state.call


def set_call(call: Call | None) -> None:
    _THREADS.state.call = call
