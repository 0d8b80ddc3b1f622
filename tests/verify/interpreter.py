"""A record of a kernel in Triton's interpreter: each load and store, its program and its addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, interpreter_builder

from verify import quick_interpreter
from verify.case import Case

quick_interpreter.install()


class Access(NamedTuple):
    """The active lanes of one load or store of one program; or a barrier of its threads, which has no lanes."""

    kind: str  # "load", "store", "atomic" or "barrier"
    program: int
    addresses: np.ndarray  # of bytes, uint64
    size: int  # bytes per lane


@dataclass
class Launch:
    """One launch of one kernel. Programs are numbered with the last grid axis fastest."""

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, Tensor]  # the arguments that are tensors, by name
    accesses: list[Access] = field(default_factory=list)

    def addresses(self, *kinds: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(address, program, size) of every lane of the accesses of these kinds."""
        chosen = [access for access in self.accesses if access.kind in kinds]
        lanes = [len(access.addresses) for access in chosen]
        return (
            np.concatenate([access.addresses for access in chosen] or [np.empty(0, np.uint64)]),
            np.repeat([access.program for access in chosen], lanes).astype(np.int64),
            np.repeat([access.size for access in chosen], lanes).astype(np.int64),
        )


@contextmanager
def recording(order: Sequence[int] | None = None) -> Iterator[list[Launch]]:
    """Record the launches made inside; their programs run in `order`, or else in the order of their numbers.

    Raises RuntimeError if Triton was imported without TRITON_INTERPRET=1.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton does not interpret: set TRITON_INTERPRET=1 before it is imported")
    launches: list[Launch] = []
    # kernels may overflow to -inf, and then bound the value
    with np.errstate(over="ignore"), ExitStack() as stack:

        def wrap(owner, name, make):
            stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

        wrap(InterpretedFunction, "run", lambda run: _recorded_run(run, launches))
        wrap(InterpreterBuilder, "set_grid_idx", lambda set_index: _ordered(set_index, order))
        wrap(InterpreterBuilder, "create_masked_load", lambda load: _recorded_load(load, launches))
        wrap(InterpreterBuilder, "create_masked_store", lambda store: _recorded_store(store, launches))
        wrap(InterpreterBuilder, "create_atomic_rmw", lambda rmw: _recorded_rmw(rmw, launches))
        wrap(InterpreterBuilder, "create_atomic_cas", lambda cas: _recorded_cas(cas, launches))
        wrap(InterpreterBuilder, "create_barrier", lambda barrier: _recorded_barrier(barrier, launches))
        yield launches


@lru_cache(maxsize=1)
def recorded(case: Case) -> tuple[list[Launch], tuple[Tensor, ...]]:
    """(launches of a case with traps, its outputs); the last case is kept, so that all checks share one run.

    Raises triton's InterpreterError if a sum or a product of integers overflows.
    """
    checked = replace(interpreter_builder.options, debug=True, sanitize_overflow=True)
    with mock.patch.object(interpreter_builder, "options", checked), recording() as launches:
        outputs = case.run(traps=True)
    return launches, outputs


def _recorded_run(run, launches):
    def recorded(self, *args, grid, warmup, **kwargs):
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        launches.append(Launch(self.__name__, tuple(grid), tensors))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    return recorded


def _ordered(set_index, order):
    def ordered(self, x, y, z):
        _, ny, nz = self.grid_dim
        program = (x * ny + y) * nz + z
        if order is not None:
            program = order[program]
        self.program = program
        set_index(self, program // (ny * nz), program // nz % ny, program % nz)

    return ordered


def _record(launches, builder, kind, pointers, mask):
    addresses, active = np.broadcast_arrays(pointers.data, mask)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    launches[-1].accesses.append(Access(kind, builder.program, addresses[active].ravel(), size))


def _recorded_load(load, launches):
    def recorded(self, ptrs, mask, *args):
        _record(launches, self, "load", ptrs, mask.data)
        return load(self, ptrs, mask, *args)

    return recorded


def _recorded_store(store, launches):
    def recorded(self, ptrs, value, mask, *args):
        _record(launches, self, "store", ptrs, mask.data)
        return store(self, ptrs, value, mask, *args)

    return recorded


def _recorded_barrier(barrier, launches):
    def recorded(self):
        launches[-1].accesses.append(Access("barrier", self.program, np.empty(0, np.uint64), 0))
        return barrier(self)

    return recorded


def _recorded_rmw(rmw, launches):
    def recorded(self, operation, ptr, val, mask, *args):
        _record(launches, self, "atomic", ptr, mask.data)
        return rmw(self, operation, ptr, val, mask, *args)

    return recorded


def _recorded_cas(cas, launches):
    def recorded(self, ptr, *args):
        _record(launches, self, "atomic", ptr, np.True_)
        return cas(self, ptr, *args)

    return recorded
