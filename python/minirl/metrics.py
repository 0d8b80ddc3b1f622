"""Metrics of a run: one line of JSON per step, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from .errors import MiniRLError
from .run_dir import RunDir


class MetricsLog:
    """Writes metrics.jsonl and tensorboard/. A line is {"phase": "cold_start" or "train", "step": …, …}."""

    def __init__(self, run_dir: RunDir):
        self._file = run_dir.metrics.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir.tensorboard))

    def write(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Log a step of a phase; the line is on disk when this returns."""
        self._file.write(json.dumps({"phase": phase, "step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._board.add_scalar(f"{phase}/{name}", value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path, phase: str) -> list[dict[str, Any]]:
    """The lines of one phase. Raises MiniRLError that names the line if one is not as `MetricsLog` writes it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MiniRLError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_parse(line))
        except ValueError as error:
            raise MiniRLError(f"{path}, line {number}: {error}") from None
    return [line for line in found if line["phase"] == phase]


def _parse(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(line, dict) or not {"phase", "step"} <= set(line):
        raise ValueError(f"{text[:60]} must be an object with phase and step")
    for name, value in line.items():
        if name != "phase" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name} is {value!r}: it must be a number")
    return line
