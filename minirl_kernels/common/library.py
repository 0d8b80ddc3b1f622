"""The definition of an op: its entries in torch.library, which are opaque to torch.compile, and its backends."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ..backends import BACKENDS, resolve

_LIBRARY = torch.library.Library("minirl_kernels", "DEF")
OPS: list[Op] = []
"""Every op whose folder was imported."""


def register(schema: str, implementation: Callable, fake: Callable, *, waits: bool = False) -> Callable:
    """Define `minirl_kernels::<schema>` for tensors of any device. Returns the function that calls the op.

    The function calls `implementation` itself where torch's dispatcher would do nothing else, because a way through the
    dispatcher and back to Python takes longer than the launch of a kernel.

    implementation: the function that computes the results.
    fake: returns empty results of the right shapes and dtypes, for torch.compile.
    waits: whether the host waits for the device in the op, which keeps the op out of CUDA graphs.
    """
    name = schema.partition("(")[0]
    # compiled code must pass arguments with the strides of eager mode, because kernels read the strides
    tags = (torch.Tag.needs_exact_strides, *([torch.Tag.cudagraph_unsafe] if waits else []))
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minirl_kernels::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.minirl_kernels, name).default

    def call(*arguments):
        return implementation(*arguments) if _only_computes(arguments) else op(*arguments)

    return call


# keys of the dispatcher that are always on, and do nothing for an op of this library
_ALWAYS_ON = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.ADInplaceOrView
)
_OTHER_KEYS = ~_ALWAYS_ON.raw_repr()
_PLAIN = (Tensor, torch.nn.Parameter)


def _only_computes(arguments: tuple) -> bool:
    """Whether torch's dispatcher would only call the implementation of an op: nothing traces, records or transforms.

    A compiler traces, a mode of torch or its profiler records. functorch, a subclass of Tensor and autograd transform.
    """
    if torch.compiler.is_compiling():
        return False
    if (
        torch._C._dispatch_tls_local_include_set().raw_repr() & _OTHER_KEYS
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    records = torch.is_grad_enabled()
    for argument in arguments:
        if isinstance(argument, Tensor) and (type(argument) not in _PLAIN or (records and argument.requires_grad)):
            return False
    return True


def register_check(schema: str, check: Callable[..., None]) -> Callable:
    """`register` an op that returns a copy of its first argument, after `check` of all arguments, which may raise.

    An op, because torch.compile cannot trace branches on values. A caller uses the copy, so that torch.compile does not
    drop the op. The host waits for the device.
    """

    def checked(values: Tensor, *arguments) -> Tensor:
        check(values, *arguments)
        return values.clone()

    return register(schema, checked, lambda values, *_: torch.empty_like(values), waits=True)


class Op:
    """An op: a folder with the name of the op, whose op.py creates `Op(__package__)`.

    The folder has one file per backend: cpu.py, triton.py. Every op also has the backend "reference".
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
        """The name of the backend that runs on tensors of `device`.

        backend: "auto", or the name of a backend.
        call: the public function that error messages name; None means the name of the op.

        Raises the errors of `backends.resolve`.
        """
        return resolve(backend, device, op=call or self.name, supported=self.backends)

    def kernels(self, backend: str) -> ModuleType:
        """The module of a backend, imported on first use, because Triton may be absent."""
        module = self._modules.get(backend)
        if module is None:
            if backend == "reference" or backend not in self.backends:
                names = ", ".join(self.backends[1:])  # "reference" is the first
                raise ValueError(f"backend is {backend!r}: the kernels of {self.name} must be of one of {names}")
            module = self._modules[backend] = importlib.import_module(f".{backend}", self._package)
        return module

    def define(self, schema: str, implementation: Callable, fake: Callable) -> Callable:
        """`register` for a schema whose last argument is the name of a backend.

        implementation: takes the module of the backend, then the other arguments.
        """
        kernels = self.kernels
        return register(schema, lambda *arguments: implementation(kernels(arguments[-1]), *arguments[:-1]), fake)

    def override(self, operations: Callable[[ModuleType], dict[str, Callable]], *backends: str) -> None:
        """Declare the aten operations that the kernels of `backends` compute in batch-invariant mode.

        operations: takes the module of a backend, and returns {overload: function}, with overloads such as "mm.out".
        """
        self._overrides.update(dict.fromkeys(backends, operations))

    def overrides(self, backend: str) -> dict[str, Callable]:
        """{overload: function} of the declared aten operations of a backend. Imports the module of the backend."""
        if backend not in self._overrides:
            return {}
        return self._overrides[backend](self.kernels(backend))
