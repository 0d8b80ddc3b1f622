"""The releases that are admitted are the same in pyproject.toml, in the library's checks and in the tests."""

import re
import tomllib
from pathlib import Path

import pytest

from minirl_kernels.versions import OLDEST_TRANSFORMERS, TESTED_TRITON, describe_pair, require_transformers

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required(name):
    """{distribution: version} of a file in requirements."""
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def minor(version):
    return ".".join(version.split(".")[:2])


def bounds(releases):
    """The requirement that admits these releases of torch or triton and no others, as pip writes it."""
    oldest, *_, newest = sorted(releases, key=lambda release: int(release.split(".")[1]))
    major, last = newest.split(".")
    return f">={oldest},<{major}.{int(last) + 1}"


def test_the_oldest_admitted_releases_are_tested():
    extras = PROJECT["optional-dependencies"]
    admitted = {}
    for requirement in (*extras["train"], *extras["test"]):
        found = re.match(r"(transformers|accelerate|peft|triton)(?:>=([\d.]+))?", requirement)
        if found:
            admitted[found[1]] = found[2]
    assert admitted.keys() == required("oldest").keys()
    for name, version in required("oldest").items():
        assert version.removesuffix(".0") == admitted[name]
    assert admitted["transformers"] == OLDEST_TRANSFORMERS


def test_the_tested_pairs_of_torch_and_triton_are_admitted_and_no_others():
    of_triton = bounds(TESTED_TRITON.values())
    assert f"torch{bounds(TESTED_TRITON)}" in PROJECT["dependencies"]
    for extra in ("test", "bench"):
        (requirement,) = [line for line in PROJECT["optional-dependencies"][extra] if line.startswith("triton")]
        assert requirement.startswith(f"triton{of_triton} ;")


def test_continuous_integration_has_the_oldest_the_pinned_and_the_newest_triton():
    pinned = required("constraints")
    assert TESTED_TRITON[minor(pinned["torch"])] == minor(pinned["triton"])
    assert minor(required("oldest")["triton"]) == TESTED_TRITON["2.10"] == min(TESTED_TRITON.values())
    assert minor(required("newest")["triton"]) == max(TESTED_TRITON.values())


@pytest.mark.parametrize(
    ("torch", "triton", "line"),
    [
        ("2.13.0+cpu", "3.7.1", "torch 2.13 with triton 3.7 is tested"),
        ("2.10.0", "3.6.0", "torch 2.10 with triton 3.6 is tested"),
        ("2.13.0", "3.6.0", "torch 2.13 with triton 3.6 is not tested: torch 2.13 is tested with triton 3.7"),
        ("2.13.0+cpu", None, "torch 2.13 is tested, with triton 3.7, which is not installed"),
        ("2.9.1", "3.5.1", "torch 2.9 with triton 3.5 is not tested: torch 2.10 to 2.14 are tested"),
        ("3.0.0", None, "torch 3.0 without triton is not tested: torch 2.10 to 2.14 are tested"),
    ],
)
def test_a_pair_that_was_not_tested_is_named(torch, triton, line):
    assert describe_pair(torch, triton) == line


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [("5.5.4", True), ("4.57.6", True), ("5.17.0", True), ("5.18.0.dev0", False), ("5.18.0", False), ("6.0", False)],
)
def test_a_transformers_that_is_too_old_is_refused_by_name(version, is_refused, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr("transformers.__version__", version)
    if not is_refused:
        require_transformers()
        return
    with pytest.raises(ImportError, match=rf"^transformers is {re.escape(version)}: it must be 5\.18 or later"):
        require_transformers()
