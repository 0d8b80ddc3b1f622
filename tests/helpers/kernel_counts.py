"""Counts the kernels that a call would launch on a GPU, and its waits of the host.

A call is run with backend="triton" on CPU tensors. Its Triton kernels and its aten operations run in Triton's
interpreter and on the CPU, forward and backward, so all results are real.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from unprepared import unprepared

# operations that return memory, or another view of it, without a kernel; the schema tells about the other views
_NO_KERNEL = frozenset(
    (
        "_reshape_alias",
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "lift",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "resize_",
        "set_",
    )
)
# operations whose result, or its size, is read by the host
_WAITS = frozenset(
    (
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "bincount",
        "equal",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
)
# functions of Tensor that copy to the host; the dispatcher does not show them for a tensor that is on the CPU
_COPIES_TO_HOST = ("cpu", "numpy", "tolist")


def kernels(run: Callable[[], object]) -> list[str]:
    """The kernels that `run` would launch on a GPU, in their order: names of Triton kernels, and of aten operations.

    An aten operation counts as one kernel. sort, searchsorted, nonzero and cumsum launch more than one. Views and new
    memory are no kernels, and an operation without elements in its results launches none.
    A copy to the host is a kernel. A CPU tensor that stays one on a GPU machine is counted too.
    """
    return _recorded(run).kernels


def count_kernels(run: Callable[[], object]) -> int:
    """The number of kernels that `run` would launch on a GPU. See `kernels`, which lists them."""
    return len(kernels(run))


def waits(run: Callable[[], object]) -> list[str]:
    """The operations of `run` that make the host wait for a GPU, in their order."""
    return _recorded(run).waits


def _recorded(run) -> _Recorder:
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(unprepared())
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(kind, "run", recorder.launching(kind.run)))
        for name in _COPIES_TO_HOST:
            stack.enter_context(mock.patch.object(Tensor, name, recorder.waiting(name, getattr(Tensor, name))))
        with recorder:
            run()
    return recorder


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels: list[str] = []
        self.waits: list[str] = []

    def launching(self, launch: Callable) -> Callable:
        def recorded(kernel, *args, **kwargs):
            self.kernels.append(kernel.fn.__name__)
            with _disable_current_modes():  # the interpreter copies its arguments by torch
                return launch(kernel, *args, **kwargs)

        return recorded

    def waiting(self, name: str, copy: Callable) -> Callable:
        def recorded(*args, **kwargs):
            self.waits.append(name)
            self.kernels.append(name)
            return copy(*args, **kwargs)

        return recorded

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "minirl_kernels":  # its kernels count, not the op
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if _is_composite(func):  # only torch.inference_mode passes a composite undivided
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in _NO_KERNEL and _has_elements(out):
            self.kernels.append(f"aten::{name}")
        if name in _WAITS or _waits_for_indices(name, args) or _waits_for_repeats(func, kwargs):
            self.waits.append(f"aten::{name}")
        return out


def _is_composite(func: OpOverload) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


def _has_elements(out: object) -> bool:
    tensors = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
    return not tensors or any(value.numel() for value in tensors)


def _waits_for_indices(name: str, args: tuple) -> bool:
    """Whether the operation is an indexing by a mask, whose number of elements the host reads."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _waits_for_repeats(func: OpOverload, kwargs: dict) -> bool:
    return func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
