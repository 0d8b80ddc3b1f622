"""The folder of a run: what is in it, and how it is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import MiniRLError


class RunDir:
    """Paths of a run. Whole files are written to a temporary name and renamed; metrics.jsonl grows by lines."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model"
        self.vllm_log = path / "vllm.log"
        self.discrepancy = path / "discrepancy.json"
        self.discrepancy_picture = path / "discrepancy.png"

    def prepare(self, overwrite: bool) -> None:
        """Make sure that a new run can be written here. Raises MiniRLError; deletes nothing."""
        # a log alone is what is left of a run whose engine did not start
        if self.path.is_dir() and any(path != self.vllm_log for path in self.path.iterdir()):
            if not overwrite:
                raise MiniRLError(f"run_dir {self.path} is not empty: it must be a new folder, or pass --overwrite")
            if not self.config.exists():
                raise MiniRLError(f"run_dir {self.path} holds no config.toml: --overwrite replaces nothing but a run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise MiniRLError(f"run_dir {self.path} cannot be written to: {error.strerror}") from None

    def clear(self) -> None:
        """Delete an earlier run's files."""
        for path in (self.config, self.metrics, self.curves, self.discrepancy, self.discrepancy_picture):
            path.unlink(missing_ok=True)
        for folder in (self.tensorboard, self.model):
            shutil.rmtree(folder, ignore_errors=True)

    def existing(self) -> RunDir:
        """Itself. Raises MiniRLError unless a run has been written here."""
        if not (self.config.is_file() and self.metrics.is_file()):
            raise MiniRLError(f"{self.path} is not the folder of a run: it must hold config.toml and metrics.jsonl")
        return self


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder that takes its place at the end."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    if temporary.is_dir():
        shutil.rmtree(temporary)  # left by a run that was killed
    yield temporary
    if path.is_dir():
        shutil.rmtree(path)
    temporary.replace(path)
