"""The host's time per call of each op, by layer: `python bench/host_overhead.py`.

Tensors are tiny, so that the GPU is never the slower side. Each layer is the difference of two runs that differ in that
layer alone. They take turns, and a layer is a difference of minima.

    checks    the public function: its checks, and the choice of the backend; all of a call of torch that is stock
    autograd  the autograd.Function, torch's dispatcher where the op goes through it, and what is saved for the backward
    backend   allocations, strides, launch configuration
    launch    Triton: binding and specialising of the arguments, and the driver

Without a GPU, Triton's compiler and driver are replaced, so `launch` ends where the driver would begin.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from units import markdown_table

import minirl_kernels as mk
from minirl_kernels import backends
from minirl_kernels.batch_invariant import overrides
from minirl_kernels.batch_invariant.operations import operations
from minirl_kernels.common.library import OPS
from minirl_kernels.common.triton.launch import prepared
from minirl_kernels.ops.attention import attention_over_spans

LAYERS = ("checks", "autograd", "backend", "launch")
BATCH = 30  # calls between two readings of the clock
ON_GPU = torch.cuda.is_available()


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """The public calls by name. All have inputs that require gradients; only the forward is measured."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device=device, generator=generator).bfloat16().requires_grad_()

    x, weight, matrix = normal(8, 64), normal(64), normal(64, 64)
    ids = torch.zeros(8, dtype=torch.int64, device=device)
    logits = torch.randn(8, 8, device=device, generator=generator, requires_grad=True)
    experts = torch.arange(16, device=device).view(8, 2) % 8
    pair = (torch.full((8, 2), 0.5, device=device, requires_grad=True), experts)
    gate_up, down = normal(8, 32, 64), normal(8, 64, 16)
    q, k, v = normal(1, 4, 8, 16), normal(1, 2, 8, 16), normal(1, 2, 8, 16)
    spans = torch.tensor([[0, 0, 8, 0, 8]], device=device)
    rows = normal(2, 4, 64)
    per_token = torch.zeros(2, 4, device=device)
    batch = {
        "old_log_probs": per_token,
        "rollout_log_probs": per_token,
        "advantages": torch.ones(2, device=device),
        "loss_mask": per_token == 0,
    }
    ours = {"backend": "triton"}
    return {
        "fused_policy_loss": lambda: mk.fused_policy_loss(rows, ids.view(2, 4), **batch, **ours),
        "rms_norm": lambda: mk.rms_norm(x, weight, 1e-6, **ours),
        "softmax": lambda: mk.softmax(x, **ours),
        "log_softmax": lambda: mk.log_softmax(x, **ours),
        "mean": lambda: mk.mean(x, -1, **ours),
        "linear": lambda: mk.linear(x, matrix, **ours),
        "matmul": lambda: mk.matmul(x, matrix, **ours),
        "token_logprobs": lambda: mk.token_logprobs(x, ids, with_entropy=True, **ours),
        "moe_routing": lambda: mk.moe_routing(logits, 2, **ours),
        "moe_experts": lambda: mk.moe_experts(x, pair, gate_up, down, **ours),
        "attention": lambda: attention_over_spans(q, k, v, spans, **ours),
        "F.linear": lambda: F.linear(x, matrix),
        "F.linear in the mode": lambda: F.linear(x, matrix),
        "torch.softmax": lambda: x.softmax(-1),
        "torch.softmax in the mode": lambda: x.softmax(-1),
    }


def measured(call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Microseconds of each layer of `call`, and of the whole call as "all"."""
    stages = {
        "launch": nullcontext,
        "backend": _without_launches,
        "autograd": lambda: _without_kernels(call),
        "checks": lambda: _without_function(call),
    }
    best = dict.fromkeys(stages, float("inf"))
    call()  # imports and compiles
    for _ in range(rounds):
        for stage, context in stages.items():
            with context():
                best[stage] = min(best[stage], _seconds(call))
    ends = [*best.values(), 0.0]
    layers = {stage: 1e6 * max(ends[i] - ends[i + 1], 0.0) for i, stage in enumerate(stages)}
    return layers | {"all": 1e6 * best["launch"]}


def _seconds(call) -> float:
    call()
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.thread_time()
    for _ in range(BATCH):
        call()
    return (time.thread_time() - start) / BATCH


def _without_launches():
    return mock.patch.object(prepared, "__call__", _nothing)


def _nothing(*_, **__) -> None:
    """A function, because a call of a Mock takes longer than a launch."""


@contextmanager
def _without_kernels(call) -> Iterator[None]:
    """Each function of a backend returns the results of its first call."""
    with ExitStack() as stack:
        for op in OPS:
            if "triton" in op._modules:
                stack.enter_context(mock.patch.dict(op._modules, triton=_Once(op._modules["triton"])))
        call()
        yield


class _Once(SimpleNamespace):
    """The functions of a module, each of which runs once and then returns the same results again."""

    def __init__(self, module):
        super().__init__()
        self._module = module

    def __getattr__(self, name):
        results = []

        def function(*args, **kwargs):
            if not results:
                results.append(getattr(self._module, name)(*args, **kwargs))
            return results[0]

        setattr(self, name, function)
        return function


@contextmanager
def _without_function(call) -> Iterator[None]:
    """autograd.Function.apply returns the results of its first call."""
    results, apply = {}, torch.autograd.Function.apply.__func__

    def once(cls, *args):
        if cls not in results:
            results[cls] = apply(cls, *args)
        return results[cls]

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(once)):
        yield


@contextmanager
def _replaced_gpu() -> Iterator[None]:
    """The kernels launch on CPU tensors: nothing is compiled, and the driver does nothing."""

    def compiled(self, key, signature, device, *_):
        kernel = _Compiled()
        self.device_caches[device][0][key] = kernel
        return kernel

    idle = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    reason = backends._missing
    with (
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(
            backends, "_missing", lambda name, device: None if name == "triton" else reason(name, device)
        ),
        mock.patch.object(overrides, "operations", _operations_of_both),
    ):
        driver.set_active(idle)
        yield


class _Compiled(CompiledKernel):
    """A kernel that launches as far as the driver."""

    def __init__(self):
        self.name, self.src, self.function, self.packed_metadata = "", None, 0, ()
        self.module, self._run = self, _nothing


def _operations_of_both(key: str) -> Iterator[tuple[str, Callable]]:
    """The overrides of a GPU, without the operations that torch has on a GPU alone."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return ((name, ours) for name, ours in operations("CUDA") if has_kernel(f"aten::{name}", key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="runs of each layer (default: %(default)s)")
    parser.add_argument("names", nargs="*", help="the ops to measure (default: all)")
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if ON_GPU else "no GPU, launches end before the driver"
    print(f"µs per call, torch {torch.__version__}, triton {triton.__version__}, {where}\n")
    with nullcontext() if ON_GPU else _replaced_gpu():
        found = calls(torch.device("cuda" if ON_GPU else "cpu"))
        unknown = set(arguments.names) - found.keys()
        if unknown:
            parser.error(f"unknown names: {', '.join(sorted(unknown))}; they must be of {', '.join(found)}")
        rows = []
        for name in arguments.names or found:
            with mk.batch_invariant_mode(name.endswith("in the mode")):
                layers = measured(found[name], arguments.rounds)
            rows.append([name, *(f"{layers[layer]:.1f}" for layer in (*LAYERS, "all"))])
        print(markdown_table(["call", *LAYERS, "all"], rows))


if __name__ == "__main__":
    main()
