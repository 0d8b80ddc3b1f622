"""A prepared launch is repeated with the arguments of an unprepared launch, for every kernel and memory layout."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from unprepared import unprepared

from minirl_kernels.common.triton.launch import prepared
from verify import cases, layout


class Compiled:
    """Stands for the compiled kernel of a launch by Triton. Its launches go to `repeated`."""

    def __init__(self, kernel, options: dict[str, Any], repeated: list):
        self.kernel, self.options, self.repeated = kernel, options, repeated

    def __getitem__(self, grid):
        return lambda *args: self.repeated.append((self.kernel, grid, described(args), self.options))


def described(args):
    """Numbers as they are, and the layouts and addresses modulo 16 of tensors."""
    return [
        (x.dtype, tuple(x.shape), x.stride(), x.data_ptr() % 16) if isinstance(x, Tensor) else (type(x), x)
        for x in args
    ]


@pytest.fixture
def launched(monkeypatch):
    """(launches by Triton, repeated launches) as (kernel, grid, arguments, options of Triton).

    Later tests forget the launches that are kept here, because these run no kernel.
    """
    by_triton, repeated, kept = [], [], {}
    keep = prepared._keep

    def keep_here(self, key, *arguments):
        kept.setdefault(id(self), (self, {**self._known}))
        keep(self, key, *arguments)

    monkeypatch.setattr(prepared, "_keep", keep_here)

    def run(self, *args, grid, warmup, **constants):
        args += tuple(constants.pop(name) for name in self.arg_names[len(args) :])
        by_triton.append((self, (*grid, 1, 1)[:3], described(args), constants))
        return Compiled(self, constants, repeated)

    for kind in (JITFunction, InterpretedFunction):
        monkeypatch.setattr(kind, "run", run)
    yield by_triton, repeated
    for one, known in kept.values():
        one._known = known


def test_a_repeated_launch_has_the_arguments_of_a_new_one(launched):
    """All kernels first launch in all of their layouts, so that a launch of another layout would be found."""
    by_triton, repeated = launched
    variants = [found for case in cases.interpreter_cases() for found in layout.variants(case)]
    for _, operands, launch in variants:
        launch(operands)
    assert by_triton
    for name, operands, launch in variants:
        by_triton.clear()
        repeated.clear()
        launch(operands)
        assert not by_triton, f"{name}: prepared twice"
        with unprepared():
            launch(operands)
        assert repeated == by_triton, name
