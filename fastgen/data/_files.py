"""Reading a user's files: one clear line where that fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

MOST_LISTED = 50  # broken files that a message names
FEW, FEW_COLUMNS = 3, 20  # of other names that are too many to list; of those that an option chooses from


def read_bytes(path: Path) -> bytes:
    """The contents of a file.

    Raises:
        OSError: of the system's own type, with a message that names the file: nothing there, a link to nothing, a
            folder, a pipe, no permission.
    """
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def check_file(path: Path, expected: str = "a file that can be read") -> None:
    """Raises OSError where the path leads to no file, so that nothing waits for the other end of a pipe."""
    try:
        if path.is_file():
            return
        there = path.exists()
    except OSError as error:
        raise cannot_read(path, error) from error
    kind = (IsADirectoryError if path.is_dir() else OSError) if there else FileNotFoundError
    raise kind(f"{path}: expected {expected}, got {what_is_at(path)}")


def what_is_at(path: Path) -> str:
    """What a path leads to, for messages: "a folder", "a link to ../x, where there is nothing", ..."""
    if path.is_dir():
        return "a folder"
    if path.is_file():
        return "a file"
    if path.exists():
        return "something that is neither a file nor a folder"
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, where there is nothing"
    return "a path where there is nothing"


def cannot_read(path: Path | str, error: OSError) -> OSError:
    """An error of the same type that names the file."""
    return type(error)(error.errno, f"{path}: expected to read it, got: {error.strerror or error}")


def few(names: Collection[object], most: int = FEW) -> str:
    """The first names of a list, for messages: "a, b, c, ... (12)"."""
    shown = ", ".join(str(name) for name in [*names][:most])
    return shown + (f", ... ({len(names):,})" if len(names) > most else "")


def broken_files(
    name: str, what: str, file: Callable[[int], str], n: int, broken: Mapping[int, str], *, skip: bool
) -> tuple[str, ...]:
    """A note of the files that are left out, as they can't be read; () where there are none.

    Args:
        name: the data, as the user wrote it.
        what: of what the data consist: "images".
        file: name of file i of n.
        broken: file -> its error.
        skip: leave them out.

    Raises:
        ValueError: there are some, and ``skip`` is false. Names all of them.
    """
    if not broken:
        return ()
    shown = [
        f"{file(i).removeprefix(name).lstrip(os.sep + ': ')} ({message.rpartition(', got ')[2]})"
        for i, message in list(broken.items())[:MOST_LISTED]
    ]
    more = len(broken) - len(shown)
    listed = ", ".join(shown) + (f" and {more:,} more" if more else "")
    if skip:
        return (f"{len(broken):,} files that can't be read were left out: {listed}",)
    if len(broken) == 1:
        leave_out = ": --skip-broken leaves it out" if n > 1 else ""
        raise ValueError(next(iter(broken.values())) + leave_out)
    raise ValueError(
        f"{name}: expected {what}, got {len(broken):,} of {n:,} files that can't be read: {listed}: "
        "--skip-broken leaves them out"
    )
