"""The call that a thread is in: a head finds there whether it keeps its input, and nothing of a call is on a module."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn


class Call:
    """One forward in which a head keeps its input.

    head: the module that keeps it, out of the way of every other head. stand_in: its output; None for an empty tensor.
    owner: the module whose hooks took `arguments`. new: the fields that the output got.
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        stand_in: Tensor | None = None,
        owner: nn.Module | None = None,
        arguments: dict[str, Any] | None = None,
    ):
        self.head, self.stand_in = head, stand_in
        self.owner, self.arguments = owner, arguments
        self.hidden: Tensor | None = None
        self.new: dict[str, Any] | None = None
        self.outer = current_call()

    def keep(self, hidden: Tensor) -> Tensor:
        """The output of the head, which is not computed."""
        if self.hidden is not None:
            raise ValueError("the model calls its output embeddings more than once in a forward: it must be once")
        self.hidden = hidden
        if self.stand_in is not None:
            return self.stand_in
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
