"""Compares inputs and outputs of all modules of two engines, token by token, to find the first difference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from .forwards import Forward, common_tokens, watched
from .layers import Layers


@dataclass(frozen=True)
class Difference:
    """The difference between the values of both engines in one place, over the tokens that both computed."""

    differing_fraction: float
    """Fraction of the tokens with at least one differing value."""
    relative: float
    """|mu - pi| / |pi|, Euclidean norms over all tokens."""
    max_abs: float
    first_key: int | None
    """Key of the first token that differs, in the order of mu's computation; None if no token differs."""

    @classmethod
    def between(cls, keys: Tensor, mu: list[Tensor], pi: list[Tensor]) -> Difference:
        """Compare lists of tensors [n, F] for the tokens with the keys [n]. relative and max_abs use the first pair."""
        differs = torch.zeros(len(keys), dtype=torch.bool)
        for mu_values, pi_values in zip(mu, pi, strict=True):
            a, b = mu_values.double(), pi_values.double()
            differs |= ((a != b) & ~(a.isnan() & b.isnan())).any(1)
        delta, size = (mu[0].double() - pi[0].double()), pi[0].double()
        norm = size.norm().item()
        return cls(
            differing_fraction=differs.double().mean().item(),
            relative=delta.norm().item() / norm if norm else float(delta.norm() > 0),
            max_abs=delta.abs().max().item(),
            first_key=keys[differs][0].item() if differs.any() else None,
        )

    @property
    def is_none(self) -> bool:
        return self.first_key is None


class RemoteModel(Protocol):
    """A model in another process, which records its modules there."""

    def recording(self, rows: int) -> AbstractContextManager[dict[PlaceName, Place]]:
        """Record the first `rows` sequences of the `generate` call inside the block.

        Yields a dict that is filled when the block ends. Keys of tokens are sequence * STRIDE + place; module names are
        the names in pi's model.
        """


@dataclass(frozen=True)
class Event:
    """The difference at the input or the output of one module call."""

    module: str
    kind: str
    is_input: bool
    inside: str  # the module that ran it
    difference: Difference

    @property
    def culprit(self) -> str:
        """The module whose code produced the values. The input of a module is produced by its calling module."""
        return self.inside if self.is_input else self.module


PlaceName = tuple[str, bool, int]  # (module, whether this is its input, number of its earlier calls in the forward)


@dataclass
class Place:
    """mu's values in one place, one entry per forward."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)  # number of the forward that computed each token

    def add(self, number: int, keys: Tensor, values: list[Tensor]) -> None:
        """number: of the forward. keys: [n] keys of tokens. values: tensors [n, F]."""
        self.keys.append(keys)
        self.values.append(values)
        self.numbers.append(torch.full_like(keys, number))


class ModuleTrace:
    """Records the inputs and outputs of mu's modules inside `recording`, and compares pi's with them in `comparing`.

    rows: number of traced sequences, the first ones of the batch. All their module outputs of mu are kept in memory.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._layers = Layers(None)
        self._places: dict[PlaceName, Place] = {}
        self.tokens = 0  # the largest number of tokens that were compared in one place
        self.events: list[Event] = []
        self.forward_of: dict[int, int] = {}

    @contextmanager
    def recording(self, mu: nn.Module | RemoteModel) -> Iterator[None]:
        if not isinstance(mu, nn.Module):
            with mu.recording(self._rows) as self._places:
                yield
            return

        def record(forward: Forward, name: str, is_input: bool, occurrence: int, tensors: list[Tensor]) -> None:
            found = self._per_token(forward, tensors)
            if found is not None:
                self._places.setdefault((name, is_input, occurrence), Place()).add(forward.number, *found)

        with _observed(mu, record):
            yield

    @contextmanager
    def comparing(self, pi: nn.Module, spans: Tensor) -> Iterator[None]:
        """spans: [rows, 2], first place and end of the tokens to compare in each sequence."""
        self._spans = spans
        self._layers = Layers.of(pi)
        kinds = {name: type(module).__name__ for name, module in pi.named_modules()}

        def compare(forward: Forward, name: str, is_input: bool, occurrence: int, tensors: list[Tensor]) -> None:
            place = self._places.pop((name, is_input, occurrence), None)
            found = self._per_token(forward, tensors)
            if place is None or found is None:
                return
            difference = self._compared(place, *found)
            if difference is not None:
                inside = forward.running[-1] if forward.running else ""
                self.events.append(Event(name, kinds[name], is_input, inside, difference))

        with _observed(pi, compare):
            yield
        self._places.clear()

    def first(self) -> Event | None:
        """The first place where the engines differ."""
        return next((event for event in self.events if not event.difference.is_none), None)

    def jump(self) -> tuple[Event, float] | None:
        """(event, factor) with the largest factor: relative difference divided by the largest one computed before.

        None if fewer than two places differ.
        """
        most, largest = None, 0.0
        for event in self.events:
            relative = event.difference.relative
            if largest and (most is None or relative / largest > most[1]):
                most = event, relative / largest
            largest = max(largest, relative)
        return most

    def layer(self, event: Event) -> int | None:
        """Number of the decoder layer of the event's module; None outside the decoder layers."""
        return self._layers.number(event.module)

    def outputs(self) -> list[Event]:
        return [event for event in self.events if not event.is_input]

    def layers(self) -> list[tuple[int, Event]]:
        """The outputs of the decoder layers, with their numbers."""
        outputs = [event for event in self.outputs() if self._layers.has(event.module)]
        return [(self.layer(event), event) for event in outputs]

    def _per_token(self, forward: Forward, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
        found = [forward.per_token(tensor, self._rows) for tensor in tensors]
        if not found or any(one is None for one in found):
            return None
        return found[0][0], [values for _, values in found]

    def _compared(self, place: Place, keys: Tensor, values: list[Tensor]) -> Difference | None:
        mu_keys = torch.cat(place.keys)
        in_mu, in_pi = common_tokens(mu_keys, keys, self._spans)
        if len({tuple(values.shape[1] for values in parts) for parts in place.values}) > 1:
            return None  # the size grows with the cache
        # one engine's router may return only logits, without weights and experts
        mu = [torch.cat(parts)[in_mu] for parts in zip(*place.values, strict=True)][: len(values)]
        pi = [tensor[in_pi] for tensor in values][: len(mu)]
        if not len(in_mu) or [a.shape for a in mu] != [b.shape for b in pi]:
            return None
        self.tokens = max(self.tokens, len(in_mu))
        difference = Difference.between(mu_keys[in_mu], mu, pi)
        if not difference.is_none:
            number = torch.cat(place.numbers)[mu_keys == difference.first_key][0].item()
            self.forward_of[difference.first_key] = number
        return difference


@contextmanager
def _observed(model: nn.Module, observer) -> Iterator[None]:
    """observer(forward, name, is_input, occurrence, tensors) at each module's input and output."""
    counts: Counter = Counter()

    def seen(forward: Forward, name: str, is_input: bool, tensors: list[Tensor]) -> None:
        occurrence = counts[forward.number, name, is_input]
        counts[forward.number, name, is_input] += 1
        if tensors:
            observer(forward, name, is_input, occurrence, tensors)

    def before(forward, name, module, args, kwargs):
        seen(forward, name, True, _hidden_states(args, kwargs))

    def after(forward, name, module, output):
        seen(forward, name, False, _outputs(output))

    with watched(model, before=before, after=after):
        yield


def _hidden_states(args: tuple, kwargs: dict) -> list[Tensor]:
    """A module's first argument. Other arguments, such as masks and caches, have no row per token."""
    first = args[0] if args else kwargs.get("hidden_states")
    return [first] if isinstance(first, Tensor) else []


def _outputs(output: object) -> list[Tensor]:
    """The first tensor of an output, and later tensors of two dimensions, such as a router's weights and experts."""
    if isinstance(output, Tensor):
        return [output]
    values = list(output.values()) if hasattr(output, "values") else output if isinstance(output, (tuple, list)) else []
    tensors = [value for value in values if isinstance(value, Tensor)]
    return tensors[:1] + [tensor for tensor in tensors[1:] if tensor.dim() == 2]
