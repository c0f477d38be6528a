"""Atomic writes of files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil

TEMPORARY = re.compile(r"\.(.+?)(?:\.(\d+))?\.tmp")


def temporary_name(path: Path) -> Path:
    """A name in the same folder that only this process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, ours: Callable[[str], object]) -> None:
    """Remove temporary files, and folders of such, that processes left in a folder when they died.

    Args:
        ours: whether a file of this final name may be removed.
    """
    for file in folder.iterdir():
        match = TEMPORARY.fullmatch(file.name)
        if match and ours(match[1]):
            pid = int(match[2] or 0)
            if pid in (0, os.getpid()) or not psutil.pid_exists(pid):
                with contextlib.suppress(OSError):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing. OSError names it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(
            error.errno, f"{path}: expected to make the folder, got: {error.strerror or error}"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically: even after a crash it holds the old content or the new.

    The bytes are synced to disk under a temporary name in the same folder, which is then renamed.

    Raises:
        OSError: it can't be written (a full disk); names the file. The old content is kept.
    """
    temporary = temporary_name(path)
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # never through a link of that name
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def inside(folder: Path, *names: str) -> Path:
    """The path of a file or subfolder of ``folder``, never through a symbolic link to another place.

    Only the last name may be a link, to a file: ``write_whole`` replaces the link itself.

    Raises:
        ValueError: a name is empty, ".", "..", or holds a separator.
        FileExistsError: a folder of the path is a link, or a file.
    """
    path = folder
    for place, name in enumerate(names, 1):
        if name in ("", ".", "..") or any(mark in name for mark in ("/", "\\", ":", "\0")):
            raise ValueError(f"{folder}: expected a plain name for a file inside, got {name!r}")
        path = path / name
        last = place == len(names)
        if path.is_symlink() and (not last or path.is_dir()):
            raise FileExistsError(f"{path}: expected a folder of its own, got a link to another place")
        if not last and path.exists() and not path.is_dir():
            raise FileExistsError(f"{path}: expected a folder, got a file")
    return path


def cannot_write(path: Path, error: OSError) -> OSError:
    """An error of the same type that names the file."""
    kept = "; what was there is kept" if os.path.exists(path) else ""
    return type(error)(error.errno, f"{path}: expected to write it, got: {error.strerror or error}{kept}")
