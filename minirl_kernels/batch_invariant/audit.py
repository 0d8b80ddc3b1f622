"""Which operations ran that the mode does not cover and that are not known to be invariant by themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import overrides
from .known import is_invariant


@dataclass
class Audit:
    """Calls of operations on floating point tensors, by name and dtype, such as "aten::mm (float32)"."""

    covered: Counter[str] = field(default_factory=Counter)
    """Those that ran as ours."""
    not_covered: Counter[str] = field(default_factory=Counter)
    """Those that ran as torch's, and may give a row other bits in another batch."""

    def __str__(self) -> str:
        lines = [f"{name}: {count}" for name, count in sorted(self.not_covered.items())]
        if not lines:
            return (
                "every operation is covered; check_batch_invariant(model) tells whether a model sums over tokens itself"
            )
        return "not covered, and perhaps not invariant:\n  " + "\n  ".join(lines)


@contextmanager
def audit(each: Callable[[OpOverload, tuple, bool], None] | None = None) -> Iterator[Audit]:
    """Notes every operation of torch that this thread runs within; slow. Most useful inside batch_invariant_mode.

    each: called after each operation that counts, with it, its positional arguments, and whether it is covered.
    Yields an `Audit`. An operation that nobody has looked at counts as not covered. Operations are looked at one by
    one: a sum over tokens has other bits with another number of tokens, covered or not.
    """
    found = Audit()
    with _Composites(found), _Listener(found, each):
        yield found


def _named(name: str, values) -> str | None:
    """With the dtypes of the floating point tensors in `values`; None where there are none."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point())
    dtypes = {str(value.dtype).removeprefix("torch.") for value in tensors}
    return f"{name} ({', '.join(sorted(dtypes))})" if dtypes else None


class _Composites(TorchFunctionMode):
    """Of functions that are made of covered operations, and choose their order by the sizes."""

    def __init__(self, found: Audit):
        super().__init__()
        self._found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _CHOOSE_BY_SIZE.get(func)
        if func is torch.einsum and _einsum_chooses(args):
            name = "torch.einsum"
        listed = name and _named(name, (args, kwargs))
        if listed:
            self._found.not_covered[listed] += 1
        return func(*args, **kwargs)


_CHOOSE_BY_SIZE = {torch.linalg.multi_dot: "torch.linalg.multi_dot", torch.chain_matmul: "torch.chain_matmul"}


def _einsum_chooses(args: tuple) -> bool:
    """Without opt_einsum its operands are multiplied from the left to the right."""
    operands = sum(isinstance(value, Tensor) for value in tree_leaves(args))
    return operands > 2 and torch.backends.opt_einsum.is_available() and torch.backends.opt_einsum.enabled


def _is_composite(func: OpOverload) -> bool:
    """Whether other operations compute it on every device."""
    name = func.name()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not (has_kernel(name, "CPU") or has_kernel(name, "CUDA"))


class _Listener(TorchDispatchMode):
    def __init__(self, found: Audit, each: Callable | None):
        super().__init__()
        self._found, self._each = found, each

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_composite(func):  # arrives whole in torch.inference_mode alone
            with self:
                return func.decompose(*args, **kwargs)
        before = overrides.calls(func._schema.name)
        out = func(*args, **kwargs)
        name = _named(func._schema.name, (args, kwargs, out))
        if name is None:
            return out
        is_covered = overrides.calls(func._schema.name) > before
        if is_covered:
            self._found.covered[name] += 1
        elif func.namespace != "minirl_kernels" and not is_invariant(func, args, kwargs):
            self._found.not_covered[name] += 1
        else:
            return out
        if self._each is not None:
            self._each(func, args, is_covered)
        return out
