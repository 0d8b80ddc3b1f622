"""The choice of the backend that runs an op, and the reasons why a backend cannot run.

An op has up to three backends: `reference` (eager torch, any device), `cpu` (the native module `_C`) and `triton`.
`backend="auto"` chooses by the device of the tensors. A backend that is named explicitly runs or raises an error.
"""

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton")

_native: ModuleType | None = None
_native_reason: str | None = None


def native() -> ModuleType:
    """The compiled module `minirl_kernels._C`, which is loaded once and uses torch's thread pool.

    Raises RuntimeError with the reason if the module is missing or does not load.
    """
    global _native, _native_reason
    if _native is None and _native_reason is None:
        try:
            _native = _load_native()
        except (ImportError, RuntimeError, ValueError) as error:
            _native_reason = _why_not_loaded(error)
    if _native is None:
        raise RuntimeError(_native_reason)
    return _native


def _load_native() -> ModuleType:
    import minirl_kernels._C as module

    module.set_parallel_for(_parallel_for_address())
    module.isa_picked()  # raises for an unusable MINIRL_ISA now, rather than in the first op
    return module


def _parallel_for_address() -> int:
    """Address of torch's C symbol `torch_parallel_for`; 0 if torch has none, and kernels then run serially."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _why_not_loaded(error: Exception) -> str:
    if getattr(error, "name", None) != "minirl_kernels._C":
        return f"the native module minirl_kernels._C does not load: {error}"
    package = Path(__file__).resolve().parent
    if (package.parent / "csrc").is_dir():
        return (
            f"minirl_kernels was imported from its source folder {package}, where no _C is built; install it "
            "with `pip install -e .`, or run outside the checkout (pytest rather than python -m pytest)"
        )
    return (
        "minirl_kernels was installed without its native module _C (MINIRL_NO_NATIVE=1 at build time); reinstall "
        "it without that variable, or set MINIRL_NO_NATIVE=1 now too, to run every op by its eager reference"
    )


def _constant_when_compiling(function):
    """Make torch.compile call `function` and use the result as a constant, rather than trace into `function`.

    torch.compiler.assume_constant_result does the same, but takes seconds at import to load torch._dynamo.
    """
    function._dynamo_marked_constant = True
    return function


@_constant_when_compiling
def _missing(backend: str, device_type: str | None) -> str | None:
    if backend == "cpu":
        if device_type not in (None, "cpu"):
            return f"it runs on CPU tensors, these are on {device_type}"
        try:
            native()
        except RuntimeError as error:
            return str(error)
    if backend == "triton":
        if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cuda":  # before the environment, whose reading takes a tenth of the time of an op
            return None
        interpreting = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type is None and not interpreting and not torch.cuda.is_available():
            return "no GPU is visible (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
        if device_type is not None and not (interpreting and device_type == "cpu"):
            return (
                f"it runs on CUDA tensors, these are on {device_type} "
                "(TRITON_INTERPRET=1 runs the kernels on CPU tensors, in Triton's interpreter)"
            )
    return None


def unavailable_reason(backend: str, device: torch.device | None = None) -> str | None:
    """The reason why `backend` cannot run on tensors of `device`, or None if it can.

    backend: "reference", "cpu" or "triton".
    device: None asks for any device of this machine.
    Raises ValueError for an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    return _missing(backend, None if device is None else device.type)


def available() -> tuple[str, ...]:
    """The names of the backends that can run on this machine."""
    return tuple(name for name in BACKENDS if unavailable_reason(name) is None)


def resolve(backend: str, device: torch.device, *, op: str, supported: tuple[str, ...]) -> str:
    """The name of the backend that runs `op` on tensors of `device`.

    backend: "auto", or the name of a backend.
    op: the name of the op, for error messages.
    supported: the backends of the op.
    Raises ValueError for a backend that the op does not have, RuntimeError with the reason if it cannot run.
    """
    if backend == "auto":
        backend = _default(device.type, supported)
    if backend not in supported:
        raise ValueError(f"backend is {backend!r}; {op} must be given one of auto, {', '.join(supported)}")
    reason = _missing(backend, device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} is unavailable: {reason}")
    return backend


@_constant_when_compiling
def _default(device_type: str, supported: tuple[str, ...]) -> str:
    backend = {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference")
    if backend not in supported:
        return "reference"
    if backend == "cpu" and os.environ.get("MINIRL_NO_NATIVE") == "1" and _missing("cpu", None) is not None:
        return "reference"
    return backend


# Every kernel but the matmuls has equal bits on all instruction sets.
_MATMUL_BITS = {
    "baseline": "bits differ from all other instruction sets: baseline has no fused multiply-add",
    "amx": "in bfloat16, bits differ from all other instruction sets; else they are equal on all but baseline",
}
_COMMON_MATMUL_BITS = "bits are equal on all instruction sets but baseline, and amx in bfloat16"


def status() -> dict:
    """The state of the backends and of the native module on this machine, for `python -m minirl_kernels.env`.

    Returns {"backends": {name: {"available", "reason"}},
        "native": {"built", "supported", "picked", "why", "matmul", "threads"}}.
    """
    reasons = {name: unavailable_reason(name) for name in BACKENDS}
    return {
        "backends": {name: {"available": why is None, "reason": why} for name, why in reasons.items()},
        "native": _native_status(reasons["cpu"]),
    }


def _native_status(missing: str | None) -> dict:
    if missing is not None:
        return {"built": [], "supported": [], "picked": None, "why": missing, "matmul": None, "threads": None}
    module = native()
    built, supported, picked = module.isa_built(), module.isa_supported(), module.isa_picked()
    if os.environ.get("MINIRL_ISA") == picked:
        why = f"MINIRL_ISA={picked}"
    elif picked == [name for name in built if name in supported][-1]:
        why = "the widest built instruction set that this processor supports"
    else:
        why = "set_isa"
    threads = "torch's pool" if _parallel_for_address() else "serial: this torch exports no torch_parallel_for"
    matmul = _MATMUL_BITS.get(picked, _COMMON_MATMUL_BITS)
    native_facts = {"built": built, "supported": supported, "picked": picked, "why": why}
    return {**native_facts, "matmul": matmul, "threads": threads}
