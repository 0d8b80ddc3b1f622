"""The oldest release of transformers that the library is right with, and is tested with."""

from __future__ import annotations

import re

# Routers of older ones return probabilities, or logits alone. pyproject.toml and requirements/oldest.txt say the same.
OLDEST_TRANSFORMERS = "5.18"


def require_transformers() -> None:
    """Raises ImportError where the transformers that is installed is older than OLDEST_TRANSFORMERS."""
    import transformers

    if _numbers(transformers.__version__) < _numbers(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers is {transformers.__version__}: it must be {OLDEST_TRANSFORMERS} or later")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))
