"""The oldest supported release of transformers, which is also tested."""

from __future__ import annotations

import re

# Routers of older releases return other values. pyproject.toml and requirements/oldest.txt have the same number.
OLDEST_TRANSFORMERS = "5.18"


def require_transformers() -> None:
    """Raises ImportError if the installed transformers is older than OLDEST_TRANSFORMERS."""
    import transformers

    if _numbers(transformers.__version__) < _numbers(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers is {transformers.__version__}: it must be {OLDEST_TRANSFORMERS} or later")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))
