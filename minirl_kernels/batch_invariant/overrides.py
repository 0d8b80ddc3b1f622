"""Registers the library's kernels for aten operations in torch's dispatcher, and removes them again.

`ours` is a function of this library, and `stock` is the kernel of torch that it overrides. `ours` returns
NotImplemented for a call that it does not compute, and then the stock kernel runs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.checks import FLOAT_DTYPES
from ..ops.matmul.aten import OPERATORS, linear
from .operations import operations

_library: Any = None  # a torch.library.Library while the overrides are installed


class _Calls(threading.local):
    """The number of overridden calls of a thread, and the operation of the last one."""

    count = 0
    last = ""

    def add(self, name: str) -> None:
        self.count += 1
        self.last = name


_calls = _Calls()


def calls(name: str) -> int:
    """Number of overridden calls of this thread so far, if the last one was `name`, such as "aten::mm"; otherwise 0.

    The number rises over a call of operation `name` if, and only if, an override computed the call.
    """
    return _calls.count if _calls.last == name else 0


def install(is_wanted: Callable[[], bool]) -> None:
    """Register the overrides for all threads. A call for which is_wanted() is False runs torch's own kernel."""
    global _library
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch reports overridden kernels
        for key in ("CPU", "CUDA") if torch.version.cuda or torch.version.hip else ("CPU",):
            for name, ours in operations(key):
                _override(name, key, ours, is_wanted)
        _override_linear(is_wanted)


def uninstall() -> None:
    """Remove the overrides of all threads."""
    global _library
    _library._destroy()
    _library = None


def _override(name: str, key: str, ours: Callable[..., Tensor], is_wanted: Callable[[], bool]) -> None:
    stock = torch.library.get_kernel(f"aten::{name}", key).call_boxed
    base, _, overload = name.partition(".")
    full_name = f"aten::{base}"
    # these overloads write into an argument: the first one ("addmm_"), or a keyword argument ("mm.out")
    if base.endswith("_") or overload.endswith(("out", "grad_input")):
        target_name = "grad_input" if overload == "grad_input" else "out" if overload else None
        takes_out = base.removesuffix("_") in OPERATORS
        writes = partial(_write_result, ours, takes_out, None if base.endswith("_") else target_name)
    else:
        writes = None

    def kernel(keys, *args, **kwargs):
        if is_wanted() and args[0].dtype in FLOAT_DTYPES:
            out = ours(*args, **kwargs) if writes is None else writes(partial(stock, keys), *args, **kwargs)
            if out is not NotImplemented:
                _calls.add(full_name)
                return out
        return stock(keys, *args, **kwargs)

    _library.impl(name, kernel, key, with_keyset=True)


def _override_linear(is_wanted: Callable[[], bool]) -> None:
    """Override linear with a bias unless x has two dimensions. With two, torch calls addmm, which is overridden."""
    stock = torch.library.get_kernel("aten::linear", "CPU").call_boxed  # the same kernel on all devices

    def kernel(keys, x, weight, bias=None):
        if bias is not None and x.dim() != 2 and is_wanted() and x.dtype in FLOAT_DTYPES:
            out = linear(x, weight, bias)
            if out is not NotImplemented:
                _calls.add("aten::linear")
                return out
        return stock(keys, x, weight, bias)

    _library.impl("linear", kernel, "CompositeImplicitAutograd", with_keyset=True)


def _write_result(ours: Callable, takes_out: bool, target_name: str | None, stock: Callable, *args, **kwargs) -> Tensor:
    """Write the result of `ours` into the target, and return the target.

    takes_out: whether `ours` has an argument `out`, and can write into the target itself.
    target_name: the keyword argument that is the target. None: the first argument is.
    """
    target = args[0] if target_name is None else kwargs[target_name]
    others = args[1:] if target_name is None else args
    own = {name: value for name, value in kwargs.items() if name != target_name}
    if not _elements_apart(target):
        return NotImplemented  # torch writes overlapping elements in its own order, or raises
    shares = any(isinstance(x, Tensor) and _share_memory(x, target) for x in others)
    if takes_out and not shares:
        result = ours(*args, **own, out=target)
        if result is not NotImplemented:
            return result
    result = ours(*args, **own)
    if result is NotImplemented or result.dtype != target.dtype:
        return NotImplemented
    if shares or target.shape != result.shape:
        stock(*args, **kwargs)  # warns, resizes or raises
    return target.copy_(result)


def _elements_apart(x: Tensor) -> bool:
    """Whether the strides make sure that no two elements share memory. False for some layouts without overlap too."""
    if x.is_contiguous():
        return True
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
