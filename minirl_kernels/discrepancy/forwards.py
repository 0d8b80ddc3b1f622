"""Assigns each row of a module's tensors to a token of a sequence, inside the forwards of a model.

mu decodes with a cache and pads prompts on the left; pi computes whole sequences, padded on the right. The attention
mask gives the place of each token in both. A forward without a mask continues the forward before it if both have the
same cache. Otherwise it begins sequences without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

# The key of a token is row * STRIDE + its place in the row, without padding.
STRIDE = 1 << 32
_CACHES = ("past_key_values", "cache_params")  # names of the argument that holds the cache


@dataclass
class Forward:
    """One forward of the model. tokens: [B, S], the place of each token in its sequence, -1 for padding."""

    number: int
    tokens: Tensor
    running: list[str] = field(default_factory=list)  # names of the modules that are running, outermost first

    def keys(self, rows: int, slots: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(mask of the tokens in the first `rows` sequences [rows, S] bool, keys of these tokens [n])."""
        tokens = self.tokens[:rows, slots]
        held = tokens >= 0
        return held, (torch.arange(len(tokens))[:, None] * STRIDE + tokens)[held]

    def per_token(self, tensor: Tensor, rows: int) -> tuple[Tensor, Tensor] | None:
        """(keys [n], values [n, F]) of the tokens of the first `rows` sequences.

        tensor: [B, S, ...], [1, S, ...], [B S, F], or [B, 1, F] for the last token alone. None for other shapes.
        """
        batch, length = self.tokens.shape
        slots = slice(None)
        if tensor.dim() < 2 or tensor.numel() == 0:
            return None
        if tensor.shape[:2] == (1, length) and batch > 1:
            tensor = tensor.expand(batch, *tensor.shape[1:])
        elif tensor.shape[:2] == (batch, 1) and tensor.dim() == 3:
            slots = slice(length - 1, None)
        elif tensor.shape[:2] != (batch, length):
            # a decode step (S = 1) also has tensors [B, keys, ...], whose rows are not tokens
            if tensor.dim() != 2 or len(tensor) != batch * length:
                return None
            tensor = tensor.unflatten(0, (batch, length))
        held, keys = self.keys(rows, slots)
        values = tensor.detach()[:rows].cpu()
        return keys, values[held].flatten(1) if values.dim() > 2 else values[held][:, None]


class Forwards:
    """Follows the forwards of a model: the running one, their number, and the token id of every place."""

    def __init__(self):
        self.current: Forward | None = None
        self.count = 0
        self._cache: object = None
        self._held = torch.empty(0, 0, dtype=torch.bool)  # [B, slots so far]
        self._taken: list[tuple[Tensor, Tensor]] = []  # keys, token ids

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0] if args else None
        if input_ids is None:
            raise ValueError("input_ids is None: a forward in a comparison must be given token ids")
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        self._held = self._slots(input_ids, kwargs.get("attention_mask"), cache is not None and cache is self._cache)
        self._cache = cache
        places = (self._held.cumsum(1) - 1).masked_fill(~self._held, -1)
        self.current = Forward(self.count, places[:, -input_ids.shape[1] :])
        self.count += 1
        held, keys = self.current.keys(len(places))
        self._taken.append((keys, input_ids.detach().cpu()[held]))

    def misplaced(self, sequences: Sequence[Sequence[int]]) -> str | None:
        """Describes the first token id that differs from `sequences` at its place; None if all token ids agree."""
        ids = pad_sequence([torch.tensor(row) for row in sequences], batch_first=True, padding_value=-1)
        for keys, taken in self._taken:
            rows, places = keys // STRIDE, keys % STRIDE
            if len(rows) and rows.max() >= len(ids):
                return f"has {rows.max() + 1} rows for {len(ids)} sequences"
            # a decode continues sequences that have ended, until the last one ends
            inside = places < ids.shape[1]
            rows, places, taken = rows[inside], places[inside], taken[inside]
            expected = ids[rows, places]
            wrong = ((expected >= 0) & (expected != taken)).nonzero()
            if len(wrong):
                first = wrong[0, 0]
                return (
                    f"has token {taken[first]} at place {places[first]} of sequence {rows[first]}, instead of "
                    f"{expected[first]}: its attention_mask or its cache must show the earlier tokens"
                )
        return None

    def _slots(self, input_ids: Tensor, mask: Tensor | None, continues: bool) -> Tensor:
        """[B, slots so far] bool: True for a token, False for padding."""
        if mask is None:
            new = torch.ones(input_ids.shape, dtype=torch.bool)
            return torch.cat([self._held, new], 1) if continues else new
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            given = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
            raise ValueError(f"attention_mask {given}: it must be [B, tokens so far]")
        return mask.bool().cpu()


@contextmanager
def watched(
    model: nn.Module,
    *,
    names: Collection[str] | None = None,
    before: Callable[[Forward, str, nn.Module, tuple, dict], None] | None = None,
    after: Callable[[Forward, str, nn.Module, object], None] | None = None,
) -> Iterator[Forwards]:
    """Call `before` and `after` around the forward of each module, in the order of execution.

    names: the modules to watch; None means all. before: called as before(forward, name, module, args, kwargs).
    after: called as after(forward, name, module, output). Yields the Forwards of `model`.
    """
    forwards = Forwards()

    def enter(name, module, args, kwargs):
        if before is not None:
            before(forwards.current, name, module, args, kwargs)
        forwards.current.running.append(name)

    def leave(name, module, args, output):
        forwards.current.running.pop()
        if after is not None:
            after(forwards.current, name, module, output)

    handles = [model.register_forward_pre_hook(forwards.begin, with_kwargs=True)]
    for name, module in model.named_modules():
        if name and (names is None or name in names):
            # prepended, since the model's own hooks are part of the computation
            handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(partial(leave, name)))
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()


def common_tokens(mu: Tensor, pi: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """(indices into mu, indices into pi) of the keys that both have and that are inside the spans, in mu's order.

    mu, pi: keys [n] and [m]. spans: [rows, 2], first place and end of each row.
    """
    sorted_pi, order = pi.sort()
    place = torch.searchsorted(sorted_pi, mu).clamp(max=len(pi) - 1)
    start, end = spans[mu // STRIDE].unbind(1)
    shared = (sorted_pi[place] == mu) & (start <= mu % STRIDE) & (mu % STRIDE < end)
    in_mu = shared.nonzero()[:, 0]
    return in_mu, order[place[in_mu]]
