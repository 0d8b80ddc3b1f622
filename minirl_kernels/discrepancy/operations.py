"""The aten operations inside one module of two engines: which is the first, of those that both ran, to differ.

A decode and a forward of whole sequences do not run the same list: the decode appends to a cache, and each casts and
pads in its own places. So the lists are matched by name and dtype, and what could not be matched, or has no row for
each token (experts sort theirs), is told rather than compared. (torch's DebugMode hashes outputs whole, and the two
have no shape in common.)
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
    """The first operation that both ran and that differs, with all that they did since they were last seen to agree."""

    name: str | None
    """None: there is no such operation."""
    difference: Difference | None
    mu: list[str]
    """What mu ran since the last output that was equal, `name` at the end; the difference is made by one of these."""
    pi: list[str]


@dataclass(frozen=True)
class Operation:
    name: str  # with the dtype of the output
    output: Tensor | None  # of the traced rows; None where no dimension counts sequences


class OperationTrace(TorchDispatchMode):
    """Records what runs inside a module, in one forward of a model.

    rows: how many of the batch's first sequences are kept.
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
        """The traced sequences of [B, ...] or [B S, ...], as it is laid out."""
        batch, length = self.forward.tokens.shape
        if tensor.dim() < 2:
            return None
        if len(tensor) == batch:
            return tensor.detach()[: self._rows].to("cpu", copy=True)
        if len(tensor) == batch * length:
            return tensor.detach()[: self._rows * length].to("cpu", copy=True)
        return None


def first_difference(mu: OperationTrace, pi: OperationTrace, spans: Tensor) -> OperationDifference:
    """spans: [rows, 2], first place and end of what is to be compared of each sequence."""
    names = [[operation.name for operation in trace.operations] for trace in (mu, pi)]
    start_mu = start_pi = 0
    for match in SequenceMatcher(None, *names, autojunk=False).get_matching_blocks():
        for at_mu, at_pi in zip(
            range(match.a, match.a + match.size), range(match.b, match.b + match.size), strict=True
        ):
            ours, theirs = mu.operations[at_mu].output, pi.operations[at_pi].output
            difference = _compare(ours, theirs, mu.forward, pi.forward, spans)
            if difference is None:
                continue
            if not difference.is_none:
                ran = names[0][start_mu : at_mu + 1], names[1][start_pi : at_pi + 1]
                return OperationDifference(names[0][at_mu], difference, *ran)
            start_mu, start_pi = at_mu + 1, at_pi + 1
    return OperationDifference(None, None, names[0][start_mu:], names[1][start_pi:])


def _compare(mu: Tensor | None, pi: Tensor | None, mu_at: Forward, pi_at: Forward, spans: Tensor) -> Difference | None:
    """None where they do not have the same dimensions but for that of tokens, or there is nothing in them."""
    if mu is None or pi is None or not mu.numel():
        return None
    rows, length, steps = len(spans), pi_at.tokens.shape[1], mu_at.tokens.shape[1]
    if len(pi) == rows * length and len(mu) == rows * steps:
        pi, mu = pi.unflatten(0, (rows, length)), mu.unflatten(0, (rows, steps))
    if mu.dim() != pi.dim():
        return None
    sizes = list(zip(mu.shape, pi.shape, strict=True))
    # queries come before keys
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
