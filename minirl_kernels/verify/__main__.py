"""python -m minirl_kernels.verify: what can be proved of the Triton kernels on a machine without a GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

USAGE = """\
Each check goes through every kernel of minirl_kernels.verify.cases; none needs a GPU. It ends with status 1 and one
line for each fault.

in Triton's interpreter, which checks maths, masks and addresses, not the hardware:
  traffic      bytes that a launch loads and stores, against each input once (a product's: once for each tile that
               needs it) and each output once
  ownership    each output element is written by exactly one program, and read by no other
  order        the same bits when the programs run in reverse and in shuffled order
  bounds       no access outside the elements of the tensors that a kernel was given
  races        a barrier between reading an element and overwriting it at another width
by Triton's compiler, ahead of time:
  compile      registers, spills, shared memory, width of accesses and tensor cores on sm_80, sm_90, sm_100 and gfx942;
               rewrites docs/compile_matrix.md (--output PATH for another file)
  all          everything above
"""
INTERPRETED = ("traffic", "ownership", "order", "bounds", "races")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minirl_kernels.verify",
        usage="%(prog)s [check]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("check", nargs="?", choices=[*INTERPRETED, "compile", "all"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("docs/compile_matrix.md"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check is None:
        parser.print_help()
        return 0
    if arguments.check == "all":
        # Triton either interprets or compiles, for as long as a process lives
        return max(_again(check, arguments.output) for check in (*INTERPRETED, "compile"))
    faults = _compile(arguments.output) if arguments.check == "compile" else _interpret(arguments.check)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


def _again(check: str, output: Path) -> int:
    print(f"== {check}", flush=True)
    return subprocess.call([sys.executable, "-m", "minirl_kernels.verify", check, "--output", str(output)])


def _compile(output: Path) -> list[str]:
    if not output.parent.is_dir():
        return [f"--output is {output}: its folder must exist"]
    os.environ["TRITON_INTERPRET"] = "0"
    from . import compile_matrix

    return compile_matrix.write(output)


def _interpret(name: str) -> list[str]:
    os.environ["TRITON_INTERPRET"] = "1"
    import importlib

    from . import cases, traffic

    check = importlib.import_module(f".{name}", __package__)
    faults = []
    for case in cases.interpreter_cases():
        found = check.check(case)
        faults += found
        if name == "traffic":
            moved, floor = traffic.measure(case)
            loads, stores = (
                f"{here / case.unit_bytes:.3f} (of at most {most / case.unit_bytes:.3f})"
                for here, most in zip(moved, floor, strict=True)
            )
            print(f"{case}: times the {case.unit}, loads {loads}, stores {stores}", flush=True)
        else:
            print(f"{case}: {'FAILS' if found else 'holds'}", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main())
