"""The source of a result: the commit that was measured, as the JSON records it and the tables print it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import minirl_kernels

PACKAGE = Path(minirl_kernels.__file__).parent
# not changes of the checkout: a benchmark writes these files
OUTPUTS = (":(top,exclude)bench/results",)


def source(package: Path = PACKAGE) -> dict:
    """The commit of the checkout that holds `package`, and whether files differ from it.

    Both are None for a package that git does not track, for example an installed copy.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ":/", *OUTPUTS)
    return {"commit": commit, "dirty": None if changes is None else changes != ""}


def sources_in_words(sources: list[dict]) -> str:
    """Sentences on the sources, each sentence once: commits, uncommitted changes, installed packages and notes.

    The oldest results do not record the measured commit. They have `added_by`, the commit that added their file.
    """
    found = [
        _commits("Added by", [source["added_by"] for source in sources if "added_by" in source]),
        _commits("Measured at", [source["commit"] for source in sources if source.get("commit")]),
        "The checkout had uncommitted changes." if any(source.get("dirty") for source in sources) else "",
        "Measured with an installed package, whose commit is unknown."
        if any("commit" in source and source["commit"] is None for source in sources)
        else "",
        *(note_in_words(source) for source in sources),
    ]
    return " ".join(sentence for sentence in dict.fromkeys(found) if sentence)


def note_in_words(source: dict) -> str:
    """The note of a source as a sentence; empty where there is none."""
    note = source.get("note")
    return f"{note[0].upper()}{note[1:]}." if note else ""


def _commits(verb, commits):
    short = [commit[:7] for commit in dict.fromkeys(commits)]
    return f"{verb} commit{'s' * (len(short) > 1)} {', '.join(short)}." if short else ""


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None where git is missing or refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
