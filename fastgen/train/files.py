"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def write_whole(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: whoever reads it, even after a crash, finds the old content or the new.

    The bytes reach the disk under a temporary name in the same folder, which is then renamed.
    """
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
