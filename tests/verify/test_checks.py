"""The checks on Triton kernels in the interpreter: every kernel of the library passes, every planted fault fails."""

import pytest
import triton_cases

pytest.importorskip("triton", reason="triton is not installed")

from faulty_kernels import faulty_case
from triton.runtime.errors import InterpreterError

import minirl_kernels
from verify import bounds, cases, order, ownership, races, traffic
from verify.__main__ import main
from verify.launches import captured

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
    """The command's status is 1 if a case fails."""
    for found, status in ([faulty_case("sound")], 0), ([faulty_case("sound"), faulty_case("reads beyond the row")], 1):
        monkeypatch.setattr(cases, "interpreter_cases", lambda found=found: iter(found))
        monkeypatch.setattr("sys.argv", ["verify", "bounds"])
        assert main() == status
        said = capsys.readouterr()
        assert [line.endswith("holds") for line in said.out.splitlines()] == [True, False][: len(found)]
        assert ("reads beyond the row" in said.err) == bool(status)


def test_every_kernel_is_listed():
    """No check sees a kernel that no case launches."""
    from pathlib import Path

    package = Path(minirl_kernels.__file__).parent
    sources = [
        *package.glob("ops/*/triton.py"),
        *package.glob("ops/*/kernels*.py"),
        *package.glob("common/triton/*.py"),
    ]
    written = {
        line.split("(")[0].removeprefix("def ")
        for path in sources
        for line in path.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    launched = set()
    for case in cases.interpreter_cases():
        with captured() as launches:
            case.run()
        launched |= {launch.kernel.__name__ for launch in launches}
    assert written == launched
