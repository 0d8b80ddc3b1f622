"""audit: lists the operations that ran, and marks each one that may not be batch-invariant.

An operation counts as safe if the mode covers it, or if torch's own kernel is known to be invariant (known.py).
"""

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
    """Number of calls of each operation on floating point tensors. Keys are like "aten::mm (float32)"."""

    covered: Counter[str] = field(default_factory=Counter)
    """Calls computed by this library's kernels."""
    not_covered: Counter[str] = field(default_factory=Counter)
    """Calls computed by torch's kernels that may give a row different bits in another batch."""

    def __str__(self) -> str:
        lines = [f"{name}: {count}" for name, count in sorted(self.not_covered.items())]
        if not lines:
            return (
                "every operation is covered; check_batch_invariant(model) finds a module that sums over tokens itself"
            )
        return "not covered, and possibly not invariant:\n  " + "\n  ".join(lines)


@contextmanager
def audit(each: Callable[[OpOverload, tuple, bool], None] | None = None) -> Iterator[Audit]:
    """Record every torch operation that this thread runs inside the block. Slow; use it inside batch_invariant_mode.

    each: called after each counted operation, with (operation, its positional arguments, whether it is covered).
    Yields an `Audit`. An operation that was never examined counts as not covered.

    The audit judges single operations. A sum over tokens gives different bits for a different number of tokens, even
    if the sum is covered.
    """
    found = Audit()
    with _Composites(found), _Listener(found, each):
        yield found


def _named(name: str, values) -> str | None:
    """`name` with the dtypes of the floating point tensors in `values`; None if there is no such tensor."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point())
    dtypes = {str(value.dtype).removeprefix("torch.") for value in tensors}
    return f"{name} ({', '.join(sorted(dtypes))})" if dtypes else None


class _Composites(TorchFunctionMode):
    """Lists functions that call covered operations in an order that depends on the tensor sizes."""

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
    """Whether einsum picks the order of its products by size: opt_einsum does, torch alone goes from left to right."""
    operands = sum(isinstance(value, Tensor) for value in tree_leaves(args))
    return operands > 2 and torch.backends.opt_einsum.is_available() and torch.backends.opt_einsum.enabled


def _is_composite(func: OpOverload) -> bool:
    """Whether `func` is computed by other operations on every device, without a kernel of its own."""
    name = func.name()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(name, "CompositeImplicitAutograd") and not (has_kernel(name, "CPU") or has_kernel(name, "CUDA"))


class _Listener(TorchDispatchMode):
    def __init__(self, found: Audit, each: Callable | None):
        super().__init__()
        self._found, self._each = found, each

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_composite(func):  # only torch.inference_mode passes a composite undivided
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
