"""Refuse weak symbols in the kernel tables: check_symbols.py NM OBJECT...

The same template or inline function compiled for two instruction sets is one weak symbol, of which the
linker keeps either: a processor without AVX-512 could then run AVX-512 code. CMake runs this before it links.
"""

import subprocess
import sys


def weak_symbols(nm: str, objects: list[str]) -> list[str]:
    found = []
    for path in objects:
        listing = subprocess.run([nm, "-C", path], check=True, capture_output=True, text=True).stdout
        for line in listing.splitlines():
            kind, _, name = line[17:].partition(" ")  # after sixteen digits of address and a space
            if kind in ("W", "V", "u"):  # defined weak function, weak object, unique global
                found.append(f"{path}: {name}")
    return found


if __name__ == "__main__":
    weak = weak_symbols(sys.argv[1], sys.argv[2:])
    if weak:
        sys.exit(
            "weak symbols in the kernel tables (put the function in an anonymous namespace, "
            "and include C headers only):\n  " + "\n  ".join(weak)
        )
