"""Checks the rules of CONTRIBUTING.md that a text search can check, and prints every line that breaks one."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# (pattern of file names, pattern that their lines must not match, the rule)
RULES = [
    (
        r"\.py$",
        r"@triton\.autotune",
        "launch configurations are frozen and depend on (V, H, dtype, architecture) alone",
    ),
    (
        r"^(?!tests/).*\.(py|cu|h)$",  # some tests write such kernels to test the rule
        r"\b(tl\.atomic_\w+|atomicAdd)\b",
        "every output element is written by exactly one program",
    ),
    (
        r"\.py$",
        r"\bmake_block_ptr\b",
        "write out 64-bit addresses and masks",
    ),
    (
        r"^setup\.py$",
        r"\b(import|from) torch\b|cpp_extension",
        "the native module is built without torch",
    ),
    (
        r"^csrc/(common/|cpu/(?!dispatch)\w+\.cpp)",
        r"#\s*include <\w+>",
        "a kernel table includes C headers only: C++ headers bring weak symbols",
    ),
    (
        r"^(csrc/|CMakeLists\.txt|setup\.py)",
        r"#\s*pragma omp|-fopenmp|-march=native|-ffast-math",
        "rows are split over torch's own threads, and every build gives the same bits",
    ),
    (
        r"^minirl_kernels/(?!common/library\.py$).*\.py$",
        r"\bimport_module\b|\b__import__\b",
        "imports by string belong in common/library.py, which imports the backends of an op",
    ),
    (
        r"^minirl_kernels/ops/\w+/op\.py$",
        r"from \.(cpu|triton)\b|from \. import .*\b(cpu|triton)\b",
        "OP.kernels imports a backend that runs; another file beside it would stay unused",
    ),
    (
        r"\.py$",
        r": tl\.constexpr = ([\"'\d(-]|True|False|None)",
        "write tl.constexpr(value): triton 3.6 does not compile a plain string as a default",
    ),
    (
        r"^minirl_kernels/(common|moe|ops)/",
        r"\._replace\(",
        "use with_values of common/records.py: torch.compile of torch 2.11 fails on a result of _replace",
    ),
    (
        r"",
        r"\b(TODO|FIXME|XXX)\b",
        "finish the work instead of leaving a note",
    ),
    (
        r"",
        r"(?<![\w./$}>~:*-])/(?!(usr|proc|sys|dev|etc|bin)/)[A-Za-z]+/[A-Za-z]",
        "absolute paths of one machine do not belong in the repository",
    ),
]

# The folders and files of the package by floor, lowest first. Code imports from its own floor or from lower floors.
FLOORS = [
    {"backends", "versions"},
    {"common"},
    {"config", "correction", "objectives", "sampling_mask"},
    {"ops"},
    {"layers", "moe"},
    {"batch_invariant"},
    {"discrepancy", "env", "integrations"},
    {"__init__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def listed_files() -> list[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    own = Path(__file__).resolve().relative_to(ROOT).as_posix()
    return [name for name in names if name and name != own and (ROOT / name).is_file()]


def broken_rules(name: str, text: str) -> list[str]:
    lines = text.splitlines()
    found = [
        f"{name}:{number}: {match.group()}: {instead}"
        for files, pattern, instead in RULES
        if re.search(files, name)
        for number, line in enumerate(lines, start=1)
        for match in re.finditer(pattern, line)
    ]
    if re.match(r"(minirl_kernels|csrc)/", name) and len(lines) > MAX_LINES:
        found.append(f"{name}: {len(lines)} lines; a file has at most {MAX_LINES}")
    return found


def imported_files(name: str, text: str, files: set[str]) -> set[str]:
    """The members of `files` that the Python file `name` imports, at its top or within a function."""
    targets = []  # for each imported name, its possible paths without suffix
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets += [[alias.name.replace(".", "/")] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = Path(*Path(name).parts[: -node.level] if node.level else (), *(node.module or "").split("."))
            targets += [
                [f"{base}/{alias.name}", f"{base}"] for alias in node.names
            ]  # the alias is a module, or a name in `base`
    found = set()
    for paths in targets:
        ends = [path + end for path in paths for end in (".py", "/__init__.py")]
        found.update([end for end in ends if end in files][:1])
    return found


def broken_floors(texts: dict[str, str]) -> list[str]:
    """Imports from a higher floor, and a circle of imports if there is one. texts: {file name: text} of the package."""
    rooms = {name: Path(name).parts[1].removesuffix(".py") for name in texts}
    unknown = sorted({room for room in rooms.values() if room not in FLOOR})
    if unknown:
        return [f"minirl_kernels/{room}: has no floor; add it to FLOORS in .ci/house_rules.py" for room in unknown]
    graph = {name: imported_files(name, text, set(texts)) for name, text in texts.items()}
    found = [
        f"{name}: imports {other}, from a higher floor"
        for name, others in graph.items()
        for other in sorted(others)
        if FLOOR[rooms[other]] > FLOOR[rooms[name]]
    ]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"imports run in a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def main() -> None:
    found, package = [], {}
    for name in listed_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        found += broken_rules(name, text)
        if re.fullmatch(r"minirl_kernels/.*\.py", name):
            package[name] = text
    found += broken_floors(package)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
