"""Where a command writes: whether it may, can, and has room, found out before the work that takes long."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from ..cli import UsageError


def check_directory(target: Path, force: bool = False, source: Path | None = None, option: str = "OUT") -> None:
    """ValueError or UsageError unless `target` is a directory, or can become one, that is empty (or `force`), not `source`, and can be written."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{option}: {target} is a file, must be a directory or not exist")
    if source is not None and target.is_dir() and target.resolve() == source.resolve():
        raise UsageError(f"{option}: is the directory that is read, {target}; name another")
    if target.is_dir() and not force and any(os.scandir(target)):
        raise ValueError(f"{option}: {target} is not empty; --force writes into it")
    _try(target, f"{option}: {target}")


def check_file(file: Path, force: bool = True, option: str = "--out") -> None:
    """ValueError unless `file` can be written into a directory that is there, and is not there itself (or `force`)."""
    if file.is_dir() or (file.exists() and not force):
        raise ValueError(f"{option}: {file} is {'a directory' if file.is_dir() else 'there already; --force writes over it'}")
    if not file.parent.is_dir():
        raise ValueError(f"{option}: {file} cannot be written: there is no directory {file.parent}")
    _try(file.parent, f"{option}: {file}")


def check_room(target: Path, size: int, option: str = "OUT") -> None:
    """ValueError where the disk of `target` has less than `size` bytes free."""
    free = shutil.disk_usage(_existing(target)).free
    if free < size:
        raise ValueError(f"{option}: the disk of {target} has {free / 1e6:.2f} MB free, the model takes about {size / 1e6:.2f} MB")


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _try(directory: Path, what: str) -> None:
    """Writes a file into the directory and removes it, and the directories that it took."""
    made = []
    try:
        missing, path = [], directory.absolute()
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{what} cannot be written: {error.strerror or error}") from error
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process writes there by now
                path.rmdir()
