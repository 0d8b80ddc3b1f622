"""Expands a leading ~ in paths of the user."""

from __future__ import annotations

import os

from .errors import MiniRLError


def home(path: str, name: str) -> str:
    """`path` with a leading ~ or ~user replaced by that home folder.

    name: the option, for the message. Raises MiniRLError for an empty path or an unknown user.
    """
    expanded = os.path.expanduser(path)
    if not expanded or expanded.startswith("~"):
        raise MiniRLError(f"{name} is {path!r}: it must be a path, whose ~ stands for an existing home folder")
    return expanded
