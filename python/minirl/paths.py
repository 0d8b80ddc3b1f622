"""Paths that people write: where they mean their home folder."""

from __future__ import annotations

import os

from .errors import MiniRLError


def home(path: str, name: str) -> str:
    """`path` with a leading ~ or ~user replaced by that home folder.

    Raises MiniRLError if it is empty, or there is no such user. name: of the option that it is.
    """
    expanded = os.path.expanduser(path)
    if not expanded or expanded.startswith("~"):
        raise MiniRLError(f"{name} is {path!r}: it must be a path, and ~ in it a home folder that there is")
    return expanded
