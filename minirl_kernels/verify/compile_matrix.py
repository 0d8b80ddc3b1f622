"""What every kernel, in every launch configuration, needs of each GPU: compiled ahead of time, with no GPU there."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from .cases import Case, compile_cases
from .launches import CapturedLaunch, captured

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A GPU: the 32-bit registers and the bytes of shared memory that one program can have."""

    target: GPUTarget
    registers: int
    shared: int


PARTS = {
    "sm_80": Part(GPUTarget("cuda", 80, 32), 65_536, 163 * 1024),
    "sm_90": Part(GPUTarget("cuda", 90, 32), 65_536, 227 * 1024),
    "sm_100": Part(GPUTarget("cuda", 100, 32), 65_536, 227 * 1024),
    "gfx942": Part(GPUTarget("hip", "gfx942", 64), 131_072, 64 * 1024),
}


@dataclass(frozen=True)
class Needs:
    """Registers per thread, bytes that spill per thread, bytes of shared memory, the widest global accesses in bits."""

    registers: int
    spilled: int
    shared: int
    load_bits: int
    store_bits: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.spilled} / {self.shared} / {self.load_bits} / {self.store_bits}"


def needs(case: Case, part: Part) -> Needs:
    # the launcher asks which vendor's torch this is
    with mock.patch.object(torch.version, "hip", "0" if part.target.backend == "hip" else None), captured() as launches:
        case.kernel.call(case.rows())
    (launch,) = launches
    compiled = compile_launch(launch, part.target)
    if part.target.backend == "hip":
        return _needs_of_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    registers, spilled = _usage_of_cubin(compiled.asm["cubin"])
    load_bits, store_bits = (_widest_in_ptx(compiled.asm["ptx"], access) for access in ("ld", "st"))
    return Needs(registers, spilled, compiled.metadata.shared, load_bits, store_bits)


def compile_launch(launch: CapturedLaunch, target: GPUTarget) -> CompiledKernel:
    """As a real launch with these arguments would be: specialised to their types and alignments."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def faults(case: Case, name: str, found: Needs) -> list[str]:
    """What of it the part cannot give, or wastes."""
    part = PARTS[name]
    with mock.patch.object(torch.version, "hip", "0" if part.target.backend == "hip" else None):
        threads = case.config.threads
    reasons = []
    if found.spilled:
        reasons.append(f"spills {found.spilled} bytes of each thread")
    if found.registers * threads > part.registers:
        reasons.append(f"{threads} threads of {found.registers} registers do not fit in {part.registers}")
    if found.shared > part.shared:
        reasons.append(f"{found.shared} bytes of shared memory do not fit in {part.shared}")
    streams_in = case.kernel.reads(case.config, case.vocab_size) >= 1
    if case.is_aligned and streams_in and found.load_bits < 128:
        reasons.append(f"loads at most {found.load_bits} bits at once")
    if case.is_aligned and case.kernel.streams_out and found.store_bits < 128:
        reasons.append(f"stores at most {found.store_bits} bits at once")
    return [f"{case}, {name}: {reason}" for reason in reasons]


def table_rows(cases: Iterable[Case]) -> Iterator[tuple[str, list[str]]]:
    """(line of the table, its faults) for each case."""
    for case in cases:
        found = {name: needs(case, part) for name, part in PARTS.items()}
        wrong = [fault for name in found for fault in faults(case, name, found[name])]
        dtype = str(case.dtype).removeprefix("torch.")
        cells = [case.kernel.name, dtype, f"{case.vocab_size:,}", str(case.config.tile), str(case.config.threads)]
        yield "| " + " | ".join(cells + [str(cell) for cell in found.values()]) + " |", wrong


def header() -> str:
    return f"""# Compile matrix of the Triton kernels

Written by `python -m minirl_kernels.verify compile`; a test fails when it no longer tells the truth.

Each kernel, in each launch configuration that it can have, compiled ahead of time by the compiler of triton
{triton.__version__} with the alignments of real tensors. A cell is *registers per thread / bytes spilled per thread /
bytes of shared memory / widest global load in bits / widest global store in bits*. Nothing here was run on a GPU.
A vocabulary of 50,257 is odd, so that its rows allow no 128-bit access. token_logprobs writes no logits.

Sources: `{fingerprint()}`

| kernel | dtype | V | logits per tile | threads | {" | ".join(PARTS)} |
|{"---|" * (5 + len(PARTS))}
"""


def fingerprint() -> str:
    """Of the code of all kernels and launchers, but not of its comments and layout."""
    sources = sorted([*PACKAGE.rglob("triton_*.py"), PACKAGE / "verify" / "cases.py"])
    code = "".join(ast.unparse(_without_docstrings(ast.parse(path.read_text()))) for path in sources)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def write(path: Path) -> list[str]:
    """Compile everything, saying so line by line, and write the table; returns the faults."""
    lines, wrong = [], []
    for line, found in table_rows(compile_cases()):
        print(line, flush=True)
        lines.append(line)
        wrong += found
    path.write_text(header() + "\n".join(lines) + "\n")
    return wrong


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return tree


def _usage_of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) by the cuobjdump that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _widest_in_ptx(ptx: str, access: str) -> int:
    found = re.findall(rf"\b{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in found), default=0)


def _needs_of_amdgcn(assembly: str, shared: int) -> Needs:
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    def widest(access):
        found = re.findall(rf"\b(?:global|buffer)_{access}_(dword(?:x(\d))?|u?short)\b", assembly)
        return max((16 if name.endswith("short") else 32 * int(count or 1) for name, count in found), default=0)

    registers = field("vgpr_count") + field("agpr_count")
    return Needs(registers, field("private_segment_fixed_size"), shared, widest("load"), widest("store"))
