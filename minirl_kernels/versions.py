"""The releases of other libraries that the tests were run with."""

from __future__ import annotations

import re

# Routers of older releases return other values. pyproject.toml and requirements/oldest.txt have the same number.
OLDEST_TRANSFORMERS = "5.18"

# Each release of torch, and the release of triton that it requires. pyproject.toml has the same bounds. Continuous
# integration compiles kernels with the oldest and the newest triton of these.
TESTED_TRITON = {"2.10": "3.6", "2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}


def require_transformers() -> None:
    """Raises ImportError if the installed transformers is older than OLDEST_TRANSFORMERS."""
    import transformers

    if _numbers(transformers.__version__) < _numbers(OLDEST_TRANSFORMERS):
        raise ImportError(f"transformers is {transformers.__version__}: it must be {OLDEST_TRANSFORMERS} or later")


def describe_pair(torch: str, triton: str | None) -> str:
    """Whether the tests were run with these versions of torch and triton together, in one line.

    torch, triton: versions as their distributions name them, such as "2.13.0+cpu". triton is None if it is missing.
    """
    torch = _minor(torch)
    expected = TESTED_TRITON.get(torch)
    pair = f"torch {torch} without triton" if triton is None else f"torch {torch} with triton {_minor(triton)}"
    if expected is None:
        oldest, *_, newest = TESTED_TRITON
        return f"{pair} is not tested: torch {oldest} to {newest} are tested"
    if triton is None:
        return f"torch {torch} is tested, with triton {expected}, which is not installed"
    if _minor(triton) != expected:
        return f"{pair} is not tested: torch {torch} is tested with triton {expected}"
    return f"{pair} is tested"


def _minor(version: str) -> str:
    return ".".join(map(str, _numbers(version)[:2]))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", text)[0].split("."))
