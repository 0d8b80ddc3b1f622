"""Finds the first aten operation inside a module whose results differ between the two engines.

A decode and a forward of whole sequences do not run the same operations: only the decode appends to a cache, and both
cast and pad in different places. So the two lists are matched by name and dtype. An operation without a match, or
without one row per token, is listed in the report but not compared. torch's DebugMode does not serve here: it hashes
whole outputs, and the shapes of the two engines differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .forwards import Forward, common_tokens, watched
from .modules import Difference


@dataclass(frozen=True)
class OperationDifference:
    """The first matched operation that differs, with all operations of both engines since the last equal output."""

    name: str | None
    """The operation and its dtype; None if no matched operation differs."""
    difference: Difference | None
    mu: list[str]
    """Operations of mu since the last equal output, up to and including `name`. One of them makes the difference."""
    pi: list[str]
    """The same for pi."""


@dataclass(frozen=True)
class Operation:
    name: str  # operation and dtype of the output
    output: Tensor | None  # rows of the traced sequences; None if no dimension counts sequences


class OperationTrace(TorchDispatchMode):
    """Records the operations inside a module, in one forward of a model.

    number: of the forward. rows: number of recorded sequences, the first ones of the batch.
    """

    def __init__(self, module: str, number: int, rows: int):
        super().__init__()
        self._module, self._number, self._rows = module, number, rows
        self._is_on = False
        self.forward: Forward | None = None
        self.operations: list[Operation] = []

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        def before(forward, name, module, args, kwargs):
            if forward.number == self._number and self.forward is None:
                self.forward = forward
                self._is_on = True
                self.__enter__()

        def after(forward, name, module, output):
            if self._is_on:
                self._off()

        try:
            with watched(model, names=[self._module], before=before, after=after):
                yield
        finally:
            if self._is_on:  # the module raised
                self._off()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Tensor):
            name = f"{function} {str(first.dtype).removeprefix('torch.')}"
            self.operations.append(Operation(name, self._rows_of(first)))
        return output

    def _off(self) -> None:
        self._is_on = False
        self.__exit__(None, None, None)

    def _rows_of(self, tensor: Tensor) -> Tensor | None:
        """The traced sequences of a tensor [B, ...] or [B S, ...], in the same layout."""
        batch, length = self.forward.tokens.shape
        if tensor.dim() < 2:
            return None
        if len(tensor) == batch:
            return tensor.detach()[: self._rows].to("cpu", copy=True)
        if len(tensor) == batch * length:
            return tensor.detach()[: self._rows * length].to("cpu", copy=True)
        return None


def first_difference(mu: OperationTrace, pi: OperationTrace, spans: Tensor) -> OperationDifference:
    """Match the operations of both traces. spans: [rows, 2], first place and end of the tokens to compare."""
    names = [[operation.name for operation in trace.operations] for trace in (mu, pi)]
    start_mu = start_pi = 0
    for match in SequenceMatcher(None, *names, autojunk=False).get_matching_blocks():
        for at_mu, at_pi in zip(
            range(match.a, match.a + match.size), range(match.b, match.b + match.size), strict=True
        ):
            mu_output, pi_output = mu.operations[at_mu].output, pi.operations[at_pi].output
            difference = _compare(mu_output, pi_output, mu.forward, pi.forward, spans)
            if difference is None:
                continue
            if not difference.is_none:
                ran = names[0][start_mu : at_mu + 1], names[1][start_pi : at_pi + 1]
                return OperationDifference(names[0][at_mu], difference, *ran)
            start_mu, start_pi = at_mu + 1, at_pi + 1
    return OperationDifference(None, None, names[0][start_mu:], names[1][start_pi:])


def _compare(mu: Tensor | None, pi: Tensor | None, mu_at: Forward, pi_at: Forward, spans: Tensor) -> Difference | None:
    """The difference of two outputs; None if they are empty, or if their sizes differ in more than the token axis."""
    if mu is None or pi is None or not mu.numel():
        return None
    rows, length, steps = len(spans), pi_at.tokens.shape[1], mu_at.tokens.shape[1]
    if len(pi) == rows * length and len(mu) == rows * steps:
        pi, mu = pi.unflatten(0, (rows, length)), mu.unflatten(0, (rows, steps))
    if mu.dim() != pi.dim():
        return None
    sizes = list(zip(mu.shape, pi.shape, strict=True))
    # the first matching axis, since scores have queries before keys
    axis = next((axis for axis, pair in enumerate(sizes) if axis > 0 and pair == (steps, length)), None)
    if axis is None or any(a != b for other, (a, b) in enumerate(sizes) if other != axis):
        return None
    mu, pi = (tensor.movedim(axis, 1) for tensor in (mu, pi))
    (mu_held, mu_keys), (pi_held, pi_keys) = mu_at.keys(rows), pi_at.keys(rows)
    in_mu, in_pi = common_tokens(mu_keys, pi_keys, spans)
    if not len(in_mu):
        return None
    a, b = mu[mu_held][in_mu], pi[pi_held][in_pi]
    return Difference.between(mu_keys[in_mu], [a.reshape(len(a), -1)], [b.reshape(len(b), -1)])
