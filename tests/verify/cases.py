"""All cases. Each op has its own in tests/ops/<op>_verify.py, which is found by its name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from verify.case import Case

SOURCES = sorted((Path(__file__).resolve().parents[1] / "ops").glob("*_verify.py"))


def interpreter_cases() -> Iterator[Case]:
    """For the checks in the interpreter: every kernel, at sizes that it can run in seconds."""
    for module in _modules():
        yield from module.interpreter_cases()


def compile_cases() -> Iterator[Case]:
    """For the compiler: every launch configuration, then every other branch of the kernels once."""
    for module in _modules():
        yield from module.compile_cases()


def _modules():
    return [importlib.import_module(f"ops.{path.stem}") for path in SOURCES]
