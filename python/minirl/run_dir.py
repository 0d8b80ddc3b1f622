"""The folder of a run: its files, how they are written, and which files a new run may remove."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .config_file import load_config
from .errors import MiniRLError
from .paths import home

WRITTEN = ".minirl"  # file with the names of all files in a folder that is replaced as a whole
EVENTS = "events.out.tfevents."  # prefix of TensorBoard's files


class RunDir:
    """The paths of a run. Files are written under a temporary name and then renamed; metrics.jsonl grows by lines."""

    def __init__(self, path: Path):
        path = Path(home(str(path), "the folder of a run"))
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"
        self.model = path / "model"
        self.vllm_log = path / "vllm.log"
        self.discrepancy = path / "discrepancy.json"
        self.discrepancy_picture = path / "discrepancy.png"
        self.lock = path / ".minirl.lock"

    @contextmanager
    def held(self, overwrite: bool) -> Iterator[None]:
        """Locks the folder against other runs. Creates it if needed, and removes nothing.

        Raises MiniRLError if a run cannot be written here. The operating system frees the lock when the process ends.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = _lock(self.lock)
        except OSError as error:
            raise MiniRLError(f"run_dir {self.path} cannot be written to: {error.strerror}") from None
        if lock is None:
            raise MiniRLError(f"run_dir {self.path} belongs to a run that has not ended: it must be another folder")
        try:
            self._check(overwrite)
            yield
        finally:
            self.lock.unlink(missing_ok=True)
            lock.close()

    def _check(self, overwrite: bool) -> None:
        """Raises MiniRLError unless the folder is new, or holds a run that may be replaced."""
        # a run whose engine did not start leaves only a log
        if not set(self.path.iterdir()) - {self.vllm_log, self.lock}:
            return
        if not overwrite:
            raise MiniRLError(f"run_dir {self.path} is not empty: it must be a new folder, or pass --overwrite")
        for path in (self.config, self.metrics):
            if not path.is_file():
                raise MiniRLError(
                    f"run_dir {self.path} holds no {path.name}: --overwrite replaces only a run, which has this file"
                )
        try:
            load_config(self.config)
        except MiniRLError as error:
            raise MiniRLError(f"run_dir {self.path} holds no run for --overwrite to replace: {error}") from None
        for path in self._files():
            if path.is_dir():
                raise MiniRLError(f"{path} is a folder: it must be moved away, --overwrite replaces a file there")
        _check_replaceable(self.tensorboard, _events(self.tensorboard))
        _check_replaceable(self.model, _written(self.model))

    def clear(self) -> None:
        """Delete the files of an earlier run, and no other files."""
        for path in self._files():
            path.unlink(missing_ok=True)
        _remove(self.tensorboard, _events(self.tensorboard))
        _remove(self.model, _written(self.model))

    def _files(self) -> tuple[Path, ...]:
        reports = (self.discrepancy, self.discrepancy_picture)
        earlier = [
            path
            for report in reports
            for path in self.path.glob(f"{report.stem}-*{report.suffix}")
            if path.stem.removeprefix(f"{report.stem}-").isdecimal()
        ]
        return self.config, self.metrics, self.curves, *reports, *earlier

    def existing(self) -> RunDir:
        """Returns self. Raises MiniRLError unless the folder holds a run."""
        if not (self.config.is_file() and self.metrics.is_file()):
            raise MiniRLError(f"{self.path} is not the folder of a run: it must hold config.toml and metrics.jsonl")
        return self

    def ended(self) -> RunDir:
        """Returns self. Raises MiniRLError unless the folder holds a run with its weights."""
        if not self.existing().model.is_dir():
            raise MiniRLError(f"{self.path} holds no model yet: it must be the folder of a run that has ended")
        return self


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`. At the end, the file of this name replaces `path`.

    Raises MiniRLError if `path` is a folder.
    """
    path = Path(os.path.realpath(path))  # so that a link stays a link
    if path.is_dir():
        raise MiniRLError(f"{path} is a folder: it must be the name of a file")
    temporary = path.with_name(f".minirl.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`. At the end, it replaces the folder `path`.

    Raises MiniRLError if `path` holds a file that no run has written.
    """
    _check_replaceable(path, _written(path))
    temporary = path.with_name(f".minirl.{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed run may have left it
    temporary.mkdir()
    try:
        yield temporary
        (temporary / WRITTEN).write_text("\n".join(sorted(_names(temporary))) + "\n", encoding="utf-8")
        _remove(path, _written(path))
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_replaceable(folder: Path, written: set[str]) -> None:
    """Raises MiniRLError if the folder holds a file that no run has written."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise MiniRLError(f"{folder} is no folder: it must be moved away, a run replaces only its own folder")
    foreign = sorted(_names(folder) - written)
    if foreign:
        raise MiniRLError(
            f"{folder} holds {foreign[0]}, which no run has written: it must be moved away, a run replaces only its "
            "own files"
        )


def _names(folder: Path) -> set[str]:
    """Relative paths of all files and folders inside, at any depth."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _written(folder: Path) -> set[str]:
    """Names of the files that `replacing_folder` has written into the folder."""
    names = folder / WRITTEN
    return {WRITTEN, *names.read_text(encoding="utf-8").splitlines()} if names.is_file() else set()


def _events(folder: Path) -> set[str]:
    return {name for name in _names(folder) if name.startswith(EVENTS)}


def _remove(folder: Path, names: set[str]) -> None:
    """Delete the named files and folders, innermost first, and then the folder itself."""
    for path in [*(folder / name for name in sorted(names, reverse=True)), folder]:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _lock(path: Path) -> TextIO | None:
    """The open file, locked until it is closed or the process ends; None if another process holds the lock."""
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
        if _is_at(file, path):
            return file
        file.close()  # the earlier run has removed the file meanwhile


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
