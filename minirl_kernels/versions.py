"""The oldest releases of other projects that the library is right with, and is tested with."""

from __future__ import annotations

import re
from importlib.metadata import version

# Routers of older ones return probabilities, or logits alone; pyproject.toml says the same.
OLDEST_TRANSFORMERS = "5.18"


def require_transformers() -> None:
    """Raises ImportError where the transformers that is installed is older than OLDEST_TRANSFORMERS."""
    found = version("transformers")
    if _numbers(found) < _numbers(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers is {found}: it must be {OLDEST_TRANSFORMERS} or later")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))
