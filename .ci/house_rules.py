"""The rules of the house (CONTRIBUTING.md) that a search can check: prints each line that breaks one."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# (which files, what must not be in them, what to do instead)
RULES = [
    (
        r"\.py$",
        r"@triton\.autotune",
        "launch configurations are frozen and depend on (V, H, dtype, architecture) alone",
    ),
    (
        r"^(?!tests/).*\.(py|cu|h)$",  # the tests plant such kernels, to see them caught
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
        "a kernel table includes C headers only: C++ ones bring weak symbols",
    ),
    (
        r"^(csrc/|CMakeLists\.txt|setup\.py)",
        r"#\s*pragma omp|-fopenmp|-march=native|-ffast-math",
        "rows are split over torch's own threads, and every build gives the same bits",
    ),
    (
        r"",
        r"\b(TODO|FIXME|XXX)\b",
        "finish it",
    ),
    (
        r"",
        r"(?<![\w./$}>~:*-])/(?!(usr|proc|sys|dev|etc|bin)/)[A-Za-z]+/[A-Za-z]",
        "a path of one machine does not belong here",
    ),
]


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
        found.append(f"{name}: {len(lines)} lines; a file holds one idea in at most {MAX_LINES}")
    return found


def main() -> None:
    found = []
    for name in listed_files():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += broken_rules(name, text)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
