"""The oldest releases are the same in pyproject.toml, in the library's checks and in the tests."""

import re
import tomllib
from pathlib import Path

import pytest

from minirl_kernels.versions import OLDEST_TRANSFORMERS, require_transformers

ROOT = Path(__file__).parent.parent


def oldest_tested():
    lines = (ROOT / "requirements/oldest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_oldest_admitted_releases_are_tested():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    admitted = {}
    for requirement in (*extras["train"], *extras["test"]):
        found = re.fullmatch(r"(transformers|accelerate|peft)(?:>=([\d.]+))?", requirement)
        if found:
            admitted[found[1]] = found[2]
    assert admitted.keys() == oldest_tested().keys()
    for name, version in oldest_tested().items():
        assert version.removesuffix(".0") == admitted[name]
    assert admitted["transformers"] == OLDEST_TRANSFORMERS


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
