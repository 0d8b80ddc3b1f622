"""python tests/verify: proofs about the Triton kernels on a machine without a GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
USAGE = """\
Each check goes through the cases of every kernel (tests/ops/*_verify.py) and needs no GPU. It prints one line for each
fault to stderr, and ends with status 1 if there is one.

in Triton's interpreter, which shows maths, masks and addresses, not the hardware:
  traffic      bytes that a launch loads and stores, at most each input once (of a product: once for each tile that
               needs it) and each output once
  ownership    each output element is written by exactly one program, and read by no other
  order        the same bits when the programs run in reverse and in shuffled order
  bounds       no access outside the elements of the tensors that a kernel was given
  races        a barrier between reading an element and overwriting it at another width
by Triton's compiler, ahead of time:
  compile      registers, spills, shared memory, width of accesses and tensor cores on sm_80, sm_90, sm_100 and gfx942;
               rewrites tests/verify/compile_matrix.md (--output PATH for another file)
  layout       each sum and each product has the same register layout for all strides, addresses, and numbers of rows
               and columns, on sm_90; so it adds in one order
  all          all of the above
"""
INTERPRETED = ("traffic", "ownership", "order", "bounds", "races")
COMPILED = ("compile", "layout")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/verify",
        usage="%(prog)s [check]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("check", nargs="?", choices=[*INTERPRETED, *COMPILED, "all"], help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=FOLDER / "compile_matrix.md", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check is None:
        parser.print_help()
        return 0
    if arguments.check == "all":
        # Triton interprets or compiles for the whole life of a process
        return max(_in_new_process(check, arguments.output) for check in (*INTERPRETED, *COMPILED))
    checks = {"compile": lambda: _compile(arguments.output), "layout": _compare_layouts}
    faults = checks[arguments.check]() if arguments.check in COMPILED else _interpret(arguments.check)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


def _in_new_process(check: str, output: Path) -> int:
    print(f"== {check}", flush=True)
    return subprocess.call([sys.executable, str(FOLDER), check, "--output", str(output)])


def _compile(output: Path) -> list[str]:
    if not output.parent.is_dir():
        return [f"--output is {output}: its folder must exist"]
    os.environ["TRITON_INTERPRET"] = "0"
    from verify import compile_matrix

    return compile_matrix.write(output)


def _compare_layouts() -> list[str]:
    os.environ["TRITON_INTERPRET"] = "0"
    from verify import layout

    return layout.check_all()


def _interpret(name: str) -> list[str]:
    os.environ["TRITON_INTERPRET"] = "1"
    import importlib

    from verify import cases, traffic

    check = importlib.import_module(f"verify.{name}")
    faults = []
    for case in cases.interpreter_cases():
        found = check.check(case)
        faults += found
        if name == "traffic":
            moved, most = traffic.measure(case)
            loads, stores = (
                f"{here / case.unit_bytes:.3f} (of at most {bound / case.unit_bytes:.3f})"
                for here, bound in zip(moved, most, strict=True)
            )
            print(f"{case}: times the {case.unit}, loads {loads}, stores {stores}", flush=True)
        else:
            print(f"{case}: {'FAILS' if found else 'holds'}", flush=True)
    return faults


if __name__ == "__main__":
    # the modules here are in the package verify, the cases of an op in ops; both are in the folder tests
    sys.path[:1] = [str(FOLDER.parent), str(FOLDER.parent / "helpers")]
    sys.exit(main())
