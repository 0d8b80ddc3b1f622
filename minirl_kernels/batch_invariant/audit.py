"""Which operations ran that the mode does not cover and that are not known to be invariant by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import overrides
from .known import is_invariant


@dataclass
class Audit:
    """Calls of operations that computed with floating point tensors, by name and dtype, such as "aten::mm"."""

    covered: Counter[str] = field(default_factory=Counter)
    """Those that ran as ours."""
    not_covered: Counter[str] = field(default_factory=Counter)
    """Those that ran as torch's, and may give a row other bits in another batch."""

    def __str__(self) -> str:
        lines = [f"{name}: {count}" for name, count in sorted(self.not_covered.items())]
        return "not covered, and perhaps not invariant:\n  " + "\n  ".join(lines) if lines else "all is covered"


@contextmanager
def audit() -> Iterator[Audit]:
    """Notes every operation of torch that this thread runs within; slow. Most useful inside batch_invariant_mode.

    Yields an `Audit`. An operation that nobody has looked at counts as not covered.
    """
    found = Audit()
    with _Listener(found):
        yield found


class _Listener(TorchDispatchMode):
    def __init__(self, found: Audit):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = overrides.calls(func._schema.name)
        out = func(*args, **kwargs)
        dtypes = {
            str(value.dtype).removeprefix("torch.")
            for value in tree_leaves((args, kwargs, out))
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        name = f"{func._schema.name} ({', '.join(sorted(dtypes))})"
        if overrides.calls(func._schema.name) > before:
            self._found.covered[name] += 1
        elif dtypes and func.namespace != "minirl_kernels" and not is_invariant(func, args, kwargs):
            self._found.not_covered[name] += 1
        return out
