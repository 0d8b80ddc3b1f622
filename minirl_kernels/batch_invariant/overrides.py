"""Registers the library's kernels for aten operations in torch's dispatcher, and removes them again."""

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
    count = 0
    last = ""


_calls = _Calls()


def calls(name: str) -> int:
    """Number of overridden calls of this thread so far, if the last one was `name`, such as "aten::mm"; otherwise 0."""
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
    global _library
    _library._destroy()
    _library = None


def _override(name: str, key: str, ours: Callable[..., Tensor], is_wanted: Callable[[], bool]) -> None:
    call_stock = torch.library.get_kernel(f"aten::{name}", key).call_boxed
    base, _, overload = name.partition(".")
    full_name = f"aten::{base}"
    if base.endswith("_") or overload.endswith(("out", "grad_input")):
        given = "grad_input" if overload == "grad_input" else "out" if overload else None
        writes = partial(_written, ours, base.removesuffix("_") in OPERATORS, None if base.endswith("_") else given)
    else:
        writes = None

    def kernel(keys, *args, **kwargs):
        if is_wanted() and args[0].dtype in FLOAT_DTYPES:
            out = ours(*args, **kwargs) if writes is None else writes(partial(call_stock, keys), *args, **kwargs)
            if out is not NotImplemented:
                _calls.count += 1
                _calls.last = full_name
                return out
        return call_stock(keys, *args, **kwargs)

    _library.impl(name, kernel, key, with_keyset=True)


def _override_linear(is_wanted: Callable[[], bool]) -> None:
    call_stock = torch.library.get_kernel("aten::linear", "CPU").call_boxed  # the same kernel on all devices

    def kernel(keys, x, weight, bias=None):
        if bias is not None and x.dim() != 2 and is_wanted() and x.dtype in FLOAT_DTYPES:
            out = linear(x, weight, bias)
            if out is not NotImplemented:
                _calls.count += 1
                _calls.last = "aten::linear"
                return out
        return call_stock(keys, x, weight, bias)

    _library.impl("linear", kernel, "CompositeImplicitAutograd", with_keyset=True)


def _written(ours: Callable, is_product: bool, given: str | None, stock: Callable, *args, **kwargs) -> Tensor:
    """Write the result of `ours` into the argument `given`, or into the first argument if `given` is None."""
    target = args[0] if given is None else kwargs[given]
    others = args[1:] if given is None else args
    own = {name: value for name, value in kwargs.items() if name != given}
    if not _elements_apart(target):
        return NotImplemented  # torch writes overlapping elements in its own order, or raises
    shares = any(isinstance(x, Tensor) and _share_memory(x, target) for x in others)
    if is_product and not shares:
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
    """Whether no two elements share memory, judged by the sorted strides."""
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
