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
    """The lines of one phase. Raises MiniRLError that names the line if one is not JSON."""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise MiniRLError(f"{path}, line {number}: not valid JSON: {error}") from None
    return [line for line in lines if line["phase"] == phase]
