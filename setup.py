"""The build by setuptools, which calls CMake for the native module. CMakeLists.txt describes the native code.

Environment variables: MINIRL_NO_NATIVE=1 skips the native module, and CMAKE_ARGS is passed to CMake.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
ADVICE = "Set MINIRL_NO_NATIVE=1 to install without it; every op then runs its eager reference, which is slow."


# `pip install --no-build-isolation` uses the installed setuptools, whatever pyproject.toml requires.
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(f"setuptools is {setuptools.__version__}: it must be 77 or later to read pyproject.toml")


def without_native() -> bool:
    value = os.environ.get("MINIRL_NO_NATIVE", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"MINIRL_NO_NATIVE is {value!r}; it must be 1, 0 or unset")
    return value == "1"


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        if shutil.which("cmake") is None:
            raise CompileError(f"minirl_kernels._C is built by CMake, and no cmake is on the PATH. {ADVICE}")
        try:
            import pybind11  # here, because an install without the native module does not need it
        except ModuleNotFoundError:
            raise CompileError(f"minirl_kernels._C needs pybind11, and {sys.executable} has none. {ADVICE}") from None

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Plain and editable installs share a folder, so that a second build compiles only changed files.
        # CMake's cache is removed, because it names tools of an isolated environment that no longer exists.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{platform.machine()}"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *(["-GNinja"] if shutil.which("ninja") else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            result = subprocess.run(command)
            if result.returncode != 0:
                raise CompileError(
                    f"building minirl_kernels._C failed: `{shlex.join(command)}` ended with "
                    f"{result.returncode}, for the reason printed above. It needs GCC or Clang with C++17. {ADVICE}"
                )


setup(
    packages=find_packages(include=["minirl_kernels", "minirl_kernels.*"]) + find_packages("python"),
    package_dir={"minirl": "python/minirl"},
    ext_modules=[] if without_native() else [Extension("minirl_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
