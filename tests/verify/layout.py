"""Sums in one order: every memory layout of the operands gives each reduction the same register layout.

A sum across threads adds in the order of the register layout of its operand. The compiler chooses this layout for each
specialisation of a kernel, and a specialisation depends on the alignment of addresses and strides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.compiler import ASTSource, make_backend

from verify.case import Case
from verify.compile_matrix import PARTS, all_cases, on_all_cores, specialized
from verify.launches import CapturedLaunch, captured

PART = "sm_90"
ALIAS = re.compile(r"^(#\w+) = (.*)$", re.MULTILINE)
REDUCTION = re.compile(r'"tt\.(reduce|scan)".*?\}\) : \((.*?)\) ->', re.DOTALL)
PRODUCT = re.compile(r"\b(tt\.dot|ttng\.warp_group_dot) .* -> (.*?)(?: loc\(.*)?$", re.MULTILINE)
FLOATS = re.compile(r"tensor<[\dx]*(?:f16|bf16|f32|f64)\b")


def check_all() -> list[str]:
    """The faults of all cases; prints a line for each case."""
    wrong = []
    for line, found in on_all_cores(_checked):
        print(line, flush=True)
        wrong += found
    return wrong


def check(case: Case) -> list[str]:
    """The faults of a case. Nothing is compiled if all of its operands give one specialisation."""
    return faults(case, specializations(case))


def specializations(case: Case) -> dict[str, tuple[str, CapturedLaunch]]:
    """The distinct specialisations of the case and of the cases like it: (name of the operands, launch) by key."""
    found: dict[str, tuple[str, CapturedLaunch]] = {}
    for name, operands, launch_operands in variants(case):
        with captured() as launches:
            launch_operands(operands)
        (launch,) = launches
        source, options = specialized(launch, PARTS[PART].target)
        found.setdefault(f"{source.hash()} {sorted(options.items(), key=str)}", (name, launch))
    return found


def reductions(ttgir: str) -> list[str]:
    """The operand of every reduction of floats and the result of every product, with their layouts, in order."""
    aliases = dict(ALIAS.findall(ttgir))
    found = [(match.start(), match[1], match[2]) for match in REDUCTION.finditer(ttgir) if FLOATS.search(match[2])]
    found += [(match.start(), match[1], match[2]) for match in PRODUCT.finditer(ttgir)]
    return [f"{operation} of {_resolved(tensors, aliases)}" for _, operation, tensors in sorted(found)]


def _checked(number: int) -> tuple[str, list[str]]:
    case = all_cases()[number]
    found = specializations(case)
    wrong = faults(case, found)
    return f"{case}: {'FAILS' if wrong else 'holds'} in {len(found)} specialisations", wrong


def faults(case: Case, found: dict[str, tuple[str, CapturedLaunch]]) -> list[str]:
    """One line for each specialisation whose reductions have other layouts than the reductions of the first."""
    if len(found) == 1:
        return []
    (first, expected), *others = [(name, _compiled_reductions(launch)) for name, launch in found.values()]
    wrong = []
    for other, layouts in others:
        if layouts != expected:
            # a kernel that has more reductions differs from the last reduction of the other
            pairs = zip([*expected, "no reduction"], [*layouts, "no reduction"], strict=False)
            a, b = next((a, b) for a, b in pairs if a != b)
            wrong.append(f"{case}: {a} ({first}), but {b} ({other})")
    return wrong


def _compiled_reductions(launch: CapturedLaunch) -> list[str]:
    return reductions(_with_layouts(*specialized(launch, PARTS[PART].target)))


def _with_layouts(source: ASTSource, options: dict[str, Any]) -> str:
    """The code in which the compiler has just chosen the layouts. The passes after it take most of the time."""
    target = PARTS[PART].target
    backend = make_backend(target)
    chosen = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, chosen, source.language)
    generators = backend.get_codegen_implementation(chosen), backend.get_module_map()
    code, metadata = source.make_ir(target, chosen, *generators, context), {}
    for stage in ("ttir", "ttgir"):
        code = stages[stage](code, metadata)
    return str(code)


def variants(case: Case) -> Iterator[tuple[str, Any, Callable[[Any], Any]]]:
    """(name, operands, launch) of the case, of the cases like it, and with bases that are off by one element."""
    cases = [case, *case.alike()]
    for like in cases:
        yield like.sizes, like.operands(), like.launch
    operands = case.operands()
    for name in _tensor_names(operands):
        yield f"{case.sizes}, {name} off by one element", _shifted(operands, {name}), case.launch
    for like in cases:
        operands = like.operands()
        everything = set(_tensor_names(operands))
        yield f"{like.sizes}, all tensors off by one element", _shifted(operands, everything), like.launch


def _tensor_names(operands: Any, prefix: str = "") -> list[str]:
    return [
        name
        for field, value in _fields(operands)
        for name in ([prefix + field] if isinstance(value, Tensor) else _tensor_names(value, f"{prefix}{field}."))
    ]


def _shifted(operands: Any, names: set[str], prefix: str = "") -> Any:
    """The operands, with the tensors of these names in memory that begins one element after an aligned address."""
    changed = {}
    for field, value in _fields(operands):
        name = prefix + field
        changed[field] = (
            (_off_by_one(value) if name in names else value)
            if isinstance(value, Tensor)
            else _shifted(value, names, f"{name}.")
        )
    if not changed:
        return operands
    return type(operands)(*changed.values()) if isinstance(operands, tuple) else type(operands)(**changed)


def _fields(operands: Any) -> list[tuple[str, Any]]:
    """The fields of a dataclass or of a named tuple; anything else has none."""
    names = getattr(operands, "__dataclass_fields__", getattr(operands, "_fields", ()))
    return [(name, getattr(operands, name)) for name in names]


def _off_by_one(x: Tensor) -> Tensor:
    size = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.empty(1 + size, dtype=x.dtype)
    return memory.as_strided(x.shape, x.stride(), 1).copy_(x)


def _resolved(tensors: str, aliases: dict[str, str]) -> str:
    """The types with the name of each layout replaced by the layout, which may name others."""
    while True:
        replaced = re.sub(r"#\w+\b(?!\.)", lambda match: aliases.get(match[0], match[0]), tensors)
        if replaced == tensors:
            return tensors
        tensors = replaced
