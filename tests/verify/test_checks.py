"""The checks on Triton kernels in the interpreter: every kernel of the library passes, every planted fault fails."""

from functools import partial

import pytest
import torch
import triton_cases

pytest.importorskip("triton", reason="triton is not installed")

from faulty_kernels import faulty_case
from triton.runtime.errors import InterpreterError

from minirl_kernels.verify import (
    attention_cases,
    bounds,
    cases,
    expert_cases,
    matmul_cases,
    order,
    ownership,
    races,
    row_cases,
    traffic,
)
from minirl_kernels.verify.__main__ import main

pytestmark = triton_cases.interpreter_only()

CHECKS = {check.__name__.rpartition(".")[2]: check for check in (traffic, ownership, order, bounds, races)}
FAULTS = {
    "reads twice": ["traffic"],
    "writes twice": ["traffic"],
    "reads beyond the row": ["traffic", "bounds"],
    "leaves the last element": ["ownership"],
    "reads what others write": ["ownership", "order"],
    "all write one element": ["ownership", "order"],
    "atomic": ["ownership"],
    "overwrites unread halves": ["races"],
    "reads what it overwrote": ["races"],
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", list(cases.interpreter_cases()), ids=str)
def test_every_kernel_holds(case, check):
    assert CHECKS[check].check(case) == []


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["sound", "narrows upwards"])
def test_a_sound_kernel_holds(name, check):
    assert CHECKS[check].check(faulty_case(name)) == []


@pytest.mark.parametrize(("fault", "check"), [(fault, check) for fault, checks in FAULTS.items() for check in checks])
def test_a_fault_is_found(fault, check):
    faults = CHECKS[check].check(faulty_case(fault))
    assert faults
    assert all(line.startswith(fault) for line in faults)


def test_an_integer_that_overflows_is_found():
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation add"):
        bounds.check(faulty_case("overflows"))


def test_the_command_tells_of_each_case(monkeypatch, capsys):
    """And its status is 1 where one fails."""
    for found, status in ([faulty_case("sound")], 0), ([faulty_case("sound"), faulty_case("reads beyond the row")], 1):
        monkeypatch.setattr(cases, "interpreter_cases", lambda found=found: iter(found))
        monkeypatch.setattr("sys.argv", ["verify", "bounds"])
        assert main() == status
        said = capsys.readouterr()
        assert [line.endswith("holds") for line in said.out.splitlines()] == [True, False][: len(found)]
        assert ("reads beyond the row" in said.err) == bool(status)


def test_every_kernel_is_listed():
    """A kernel that nobody launches from the list of cases is a kernel that nobody checks."""
    from pathlib import Path

    import minirl_kernels
    from minirl_kernels.verify.launches import captured

    package = Path(minirl_kernels.__file__).parent
    sources = [*package.glob("ops/*/triton.py"), *package.glob("ops/*/kernels.py"), *package.glob("common/triton/*.py")]
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in sources
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    launched = set()
    rows = cases.Rows.make(64, torch.float32)
    operands = expert_cases.Operands.make(expert_cases.Sizes(4, 2, 3, 16, 16), torch.float32)
    calls = [partial(kernel.call, rows) for kernel in (*cases.KERNELS, *cases.ROUTERS)]
    calls += [partial(kernel.call, operands) for kernel in expert_cases.KERNELS]
    sequences = attention_cases.Operands.make(attention_cases.Sizes((4,), (4,), 1, 2, 16, 16), torch.float32)
    calls += [partial(kernel.call, sequences) for kernel in attention_cases.KERNELS]
    operands = row_cases.Operands.make(4, 64, torch.float32, 0)
    calls += [partial(kernel.call, operands) for kernel in (*row_cases.KERNELS, *row_cases.OVER_COLUMNS)]
    products = matmul_cases.Sizes(4, 16, 16)
    calls += [partial(kernel.run, products, torch.float32) for kernel in (*matmul_cases.LAYOUTS, *matmul_cases.MANY)]
    for call in calls:
        with captured() as launches:
            call()
        launched |= {launch.kernel.__name__ for launch in launches}
    assert written == launched
