"""The needs of every kernel, in every launch configuration, on each GPU: compiled ahead of time, without a GPU."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

import minirl_kernels
from verify.case import Case
from verify.cases import SOURCES, compile_cases
from verify.launches import CapturedLaunch, captured, on_gpu

T = TypeVar("T")
PACKAGE = Path(minirl_kernels.__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """A GPU: the 32-bit registers and the bytes of shared memory that one program can have."""

    target: GPUTarget
    registers: int
    shared: int

    @property
    def name(self) -> str:
        return self.target.arch if self.target.backend == "hip" else f"sm_{self.target.arch}"


PARTS = {
    "sm_80": Part(GPUTarget("cuda", 80, 32), 65_536, 163 * 1024),
    "sm_90": Part(GPUTarget("cuda", 90, 32), 65_536, 227 * 1024),
    "sm_100": Part(GPUTarget("cuda", 100, 32), 65_536, 227 * 1024),
    "gfx942": Part(GPUTarget("hip", "gfx942", 64), 131_072, 64 * 1024),
}


@dataclass(frozen=True)
class Needs:
    """Registers per thread, bytes that spill per thread, bytes of shared memory, the widest global accesses in bits,
    and the kind of tensor-core instructions."""

    registers: int
    spilled: int
    shared: int
    load_bits: int
    store_bits: int
    tensor_cores: str = ""

    def __str__(self) -> str:
        numbers = f"{self.registers} / {self.spilled} / {self.shared} / {self.load_bits} / {self.store_bits}"
        return f"{numbers} / {self.tensor_cores}" if self.tensor_cores else numbers


def needs(case: Case, part: Part) -> Needs:
    with on_gpu(part.name), captured() as launches:
        case.run()
    (launch,) = launches
    compiled = compile_launch(launch, part.target)
    if part.target.backend == "hip":
        return _needs_of_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    registers, spilled, tensor_cores = _read_cubin(compiled.asm["cubin"], multiplies=_asks_for_tensor_cores(ptx))
    load_bits, store_bits = (_widest_in_ptx(ptx, access) for access in ("ld", "st"))
    return Needs(registers, spilled, compiled.metadata.shared, load_bits, store_bits, tensor_cores)


def compile_launch(launch: CapturedLaunch, target: GPUTarget) -> CompiledKernel:
    """Compile as a real launch with these arguments does, which specialises to their types and alignments."""
    source, options = specialized(launch, target)
    return triton.compile(source, target=target, options=options)


def specialized(launch: CapturedLaunch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The source and the options that a real launch with these arguments compiles."""
    kernel, backend = launch.kernel, make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def faults(case: Case, name: str, found: Needs) -> list[str]:
    """The needs that the part cannot meet, and the wide accesses and tensor cores that the kernel leaves unused."""
    part = PARTS[name]
    with on_gpu(name):
        threads = case.config().threads
    reasons = []
    if found.spilled:
        reasons.append(f"spills {found.spilled} bytes of each thread")
    if found.registers * threads > part.registers:
        reasons.append(f"{threads} threads of {found.registers} registers do not fit in {part.registers}")
    if found.shared > part.shared:
        reasons.append(f"{found.shared} bytes of shared memory do not fit in {part.shared}")
    if case.loads_wide and found.load_bits < 128:
        reasons.append(f"loads at most {found.load_bits} bits at once")
    if case.stores_wide and found.store_bits < 128:
        reasons.append(f"stores at most {found.store_bits} bits at once")
    if case.on_tensor_cores and not found.tensor_cores:
        reasons.append("multiplies without tensor cores")
    return [f"{case}, {name}: {reason}" for reason in reasons]


def table_row(case: Case) -> tuple[str, list[str]]:
    """(line of the table, its faults)."""
    found = {name: needs(case, part) for name, part in PARTS.items()}
    wrong = [fault for name in found for fault in faults(case, name, found[name])]
    return "| " + " | ".join(head_of_row(case) + [str(cell) for cell in found.values()]) + " |", wrong


def head_of_row(case: Case) -> list[str]:
    """The cells of the table that tell the case."""
    dtype = str(case.dtype).removeprefix("torch.")
    return [case.name, dtype, case.size, _on_parts(case, "tile"), _on_parts(case, "threads")]


def _on_parts(case: Case, setting: str) -> str:
    """A setting of the launch configuration, for each part where they differ."""
    values = []
    for name in PARTS:
        with on_gpu(name):
            values.append(str(getattr(case.config(), setting)))
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def header() -> str:
    return f"""# Compile matrix of the Triton kernels

Written by `python tests/verify compile`. A test fails when the sources have changed since.

Each kernel, in each launch configuration that it can have, compiled ahead of time by triton {triton.__version__}, with
the alignments of real tensors. Nothing here was run on a GPU.

A cell is *registers per thread / bytes spilled per thread / bytes of shared memory / widest global load in bits /
widest global store in bits*, and then the *tensor-core instructions* if there are any. Tiles and threads are given for
each of the parts where they differ.

The size is V for kernels over logits, the number of experts for moe_routing, H × I for moe_experts, M × N × K for
matmul, the size of a head for attention, and the size of a row for the others. Rows of an odd size, such as the
vocabulary of 50,257, allow no access of 128 bits. token_logprobs writes no logits. The code of moe_experts depends on H
and I only by whether they are whole numbers of accesses of 128 bits.

Sources: `{fingerprint()}`

| kernel | dtype | size | elements per tile | threads | {" | ".join(PARTS)} |
|{"---|" * (5 + len(PARTS))}
"""


def fingerprint() -> str:
    """A hash of the code of all kernels, launchers and cases. Comments, docstrings and layout do not count."""
    sources = [
        *PACKAGE.glob("ops/*/triton.py"),
        *PACKAGE.glob("ops/*/kernels*.py"),
        *PACKAGE.glob("common/triton/*.py"),
        *SOURCES,
        *(Path(__file__).with_name(f"{name}.py") for name in ("case", "rows", "columns", "logits")),
    ]
    # by name: the package and the tests lie in different places on different machines
    sources.sort(key=lambda path: (path.parent.name, path.name))
    code = "".join(ast.unparse(_without_docstrings(ast.parse(path.read_text()))) for path in sources)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def write(path: Path) -> list[str]:
    """Compile every case on all cores, print each row, and write the table; returns the faults."""
    lines, wrong = [], []
    for line, found in on_all_cores(_row_of):
        print(line, flush=True)
        lines.append(line)
        wrong += found
    path.write_text(header() + "\n".join(lines) + "\n")
    return wrong


def on_all_cores(of_case: Callable[[int], T]) -> Iterator[T]:
    """of_case(number) for each case of all_cases(), in order. of_case is a function of a module."""
    # spawned, because a process that has run torch must not be forked; by number, because kernels cannot be pickled
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield from pool.map(of_case, range(len(all_cases())))


@functools.cache
def all_cases() -> list[Case]:
    return list(compile_cases())


def _row_of(number: int) -> tuple[str, list[str]]:
    return table_row(all_cases()[number])


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


def _read_cubin(cubin: bytes, *, multiplies: bool) -> tuple[int, int, str]:
    """(registers, bytes of local memory, tensor-core instructions) by the tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output_of(tool, *options):
            return subprocess.run([tool.path, *options, file.name], check=True, capture_output=True, text=True).stdout

        usage = output_of(triton.knobs.nvidia.cuobjdump, "-res-usage")
        # to disassemble takes as long as all other steps together
        tensor_cores = _tensor_cores_in(output_of(triton.knobs.nvidia.nvdisasm, "--print-code")) if multiplies else ""
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, tensor_cores


def _asks_for_tensor_cores(ptx: str) -> bool:
    return re.search(r"\b(mma|wgmma|tcgen05)\.", ptx) is not None


def _tensor_cores_in(assembly: str) -> str:
    found = re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b|\bv_(mfma)_", assembly)
    return (found[1] or found[2]).upper() if found else ""


def _widest_in_ptx(ptx: str, access: str) -> int:
    """In bits. Copies to shared memory count as loads."""
    found = re.findall(rf"\b{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\b", ptx)
    widths = [int(count or 1) * int(bits) for count, bits in found]
    if access == "ld":
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
        widths += [8 * int(size, 0) for size in copies]
    return max(widths, default=0)


def _needs_of_amdgcn(assembly: str, shared: int) -> Needs:
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    def widest(access):
        found = re.findall(rf"\b(?:global|buffer)_{access}_(dword(?:x(\d))?|u?short)\b", assembly)
        return max((16 if name.endswith("short") else 32 * int(count or 1) for name, count in found), default=0)

    registers = field("vgpr_count") + field("agpr_count")
    spilled = field("private_segment_fixed_size")
    return Needs(registers, spilled, shared, widest("load"), widest("store"), _tensor_cores_in(assembly))
