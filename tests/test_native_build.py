"""Exports and dependencies of the native module, and the check of the kernel tables in the build."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minirl_kernels.backends import native

CHECK = Path(__file__).resolve().parent.parent / "csrc" / "check_symbols.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files with nm and readelf")


def output_of(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_exports_its_init_function_alone():
    symbols = output_of("nm", "-D", "--defined-only", native().__file__).splitlines()
    strong = [line.split()[-1] for line in symbols if line.split()[-2] in "TDBR"]
    assert strong == ["PyInit__C"]


def test_needs_neither_torch_nor_a_second_thread_pool():
    dynamic = output_of("readelf", "-d", native().__file__)
    needed = {line.split("[")[1].split(".so")[0] for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}


# The build links only if csrc/check_symbols.py passes for every object of the tables. This test shows that it can fail.
@pytest.mark.parametrize(
    ("source", "weak"),
    [
        ("namespace { template <class T> __attribute__((noinline)) T twice(T x) { return x + x; } }", None),
        ("static inline __attribute__((noinline)) float twice(float x) { return x + x; }", None),
        ("template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }", "twice<float>"),
        ("inline __attribute__((noinline)) float twice(float x) { return x + x; }", "twice(float)"),
        ("template <class T> struct Box { static T one; }; template <class T> T Box<T>::one = 1;\n"
         "float twice(float x) { return x + Box<float>::one; }", "Box<float>::one"),
    ],
    ids=["anonymous", "static", "template", "inline", "static member"],
)  # fmt: skip
def test_weak_symbols_are_refused(source, weak, tmp_path):
    compiler = shutil.which("c++")
    assert compiler, "no c++ on the PATH, though the native module was built here"
    (tmp_path / "op.cpp").write_text(f'{source}\nextern "C" float op(float x) {{ return twice(x); }}\n')
    subprocess.run([compiler, "-O3", "-c", "op.cpp"], cwd=tmp_path, check=True)
    result = subprocess.run([sys.executable, CHECK, "nm", "op.o"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode == 0) == (weak is None)
    assert (weak or "") in result.stderr
