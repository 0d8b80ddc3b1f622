"""How an op is defined: its entries in torch.library, which torch.compile does not look into, and its backends."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch

from ..backends import BACKENDS, resolve

_LIBRARY = torch.library.Library("minirl_kernels", "DEF")
OPS: list[Op] = []
"""Every op whose folder was imported."""


def register(schema: str, implementation: Callable, fake: Callable, *, waits: bool = False) -> Callable:
    """Define `minirl_kernels::<schema>` for tensors of any device and return the callable op.

    waits: the host waits for the device in it, so that no CUDA graph can hold it.
    """
    name = schema.partition("(")[0]
    tags = (torch.Tag.needs_exact_strides, *([torch.Tag.cudagraph_unsafe] if waits else []))
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minirl_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.minirl_kernels, name).default


class Op:
    """An op in a folder of its own, which has the op's name. Its op.py makes one as `Op(__package__)`.

    The folder has a file for each backend (cpu.py, triton.py). The reference runs without one.
    """

    def __init__(self, package: str):
        self.name = package.rpartition(".")[2]
        self.backends = tuple(
            name for name in BACKENDS if name == "reference" or importlib.util.find_spec(f"{package}.{name}")
        )
        self._package = package
        self._modules: dict[str, ModuleType] = {}
        self._overrides: dict[str, Callable[[ModuleType], dict[str, Callable]]] = {}
        OPS.append(self)

    def resolve(self, backend: str, device: torch.device, call: str | None = None) -> str:
        """The backend that runs on tensors of `device`. Errors name the public function `call`, or else the op.

        Raises ValueError or RuntimeError as `backends.resolve` does.
        """
        return resolve(backend, device, op=call or self.name, supported=self.backends)

    def kernels(self, backend: str) -> ModuleType:
        """The module of a backend, imported when it is first asked for: Triton may be absent."""
        module = self._modules.get(backend)
        if module is None:
            if backend == "reference" or backend not in self.backends:
                names = ", ".join(self.backends[1:])
                raise ValueError(f"backend is {backend!r}: the kernels of {self.name} must be of one of {names}")
            module = self._modules[backend] = importlib.import_module(f".{backend}", self._package)
        return module

    def define(self, schema: str, implementation: Callable, fake: Callable) -> Callable:
        """`register` for an entry whose last argument is the name of a backend.

        implementation: takes the module of that backend first, then the other arguments.
        """
        kernels = self.kernels
        return register(schema, lambda *arguments: implementation(kernels(arguments[-1]), *arguments[:-1]), fake)

    def override(self, operations: Callable[[ModuleType], dict[str, Callable]], *backends: str) -> None:
        """In batch-invariant mode the kernels of `backends` compute these operations of aten.

        operations: takes the module of a backend, and returns for each overload, such as "mm.out", its function.
        """
        self._overrides.update(dict.fromkeys(backends, operations))

    def overrides(self, backend: str) -> dict[str, Callable]:
        """What `override` was given for a backend, by overload; imports the backend's module."""
        if backend not in self._overrides:
            return {}
        return self._overrides[backend](self.kernels(backend))
