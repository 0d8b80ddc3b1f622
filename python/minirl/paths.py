"""Paths that people write: where they mean their home folder."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import MiniRLError


def home(path: str) -> str:
    """`path` with a leading ~ or ~user replaced by that home folder. Raises MiniRLError where there is none."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise MiniRLError(f"{path} begins with {Path(path).parts[0]}: it must name a home folder, or begin with ./")
    return expanded
