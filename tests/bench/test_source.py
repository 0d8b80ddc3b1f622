"""A result names the commit that was measured, or says that the commit is unknown."""

import shutil
import subprocess

import pytest
from source import source, sources_in_words


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit, which holds a package."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path


def head(folder):
    return subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_of_a_checkout_and_whether_it_was_changed(checkout):
    commit = head(checkout)
    assert source(checkout / "package") == {"commit": commit, "dirty": False}
    (checkout / "bench" / "results" / "op.json").write_text("{}")  # an output of the benchmark
    assert source(checkout / "package") == {"commit": commit, "dirty": False}
    (checkout / "package" / "__init__.py").write_text("changed = True\n")
    assert source(checkout / "package") == {"commit": commit, "dirty": True}


def test_an_installed_copy_inside_a_checkout_has_no_commit(checkout):
    installed = checkout / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    assert source(installed) == {"commit": None, "dirty": None}


def test_sources_in_words():
    clean, dirty = {"commit": "a" * 40, "dirty": False}, {"commit": "b" * 40, "dirty": True}
    assert sources_in_words([clean, clean]) == "Measured at commit aaaaaaa."
    both = "Measured at commits aaaaaaa, bbbbbbb. The checkout had uncommitted changes."
    assert sources_in_words([clean, dirty]) == both
    installed = {"commit": None, "dirty": None}
    assert sources_in_words([installed]) == "Measured with an installed package, whose commit is unknown."
    old = [
        {"added_by": commit * 40, "note": note}
        for commit, note in (("c", "before it"), ("d", "before it"), ("e", None))
    ]
    assert sources_in_words(old) == "Added by commits ccccccc, ddddddd, eeeeeee. Before it."
