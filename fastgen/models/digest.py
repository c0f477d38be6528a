"""A digest inside a safetensors file, of everything else in it: tells damage and carelessness, not an attacker."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

KEY, EMPTY = "digest", "0" * 32
UNSEALED = {KEY: EMPTY}
"""What the metadata of a file have to hold before it is sealed."""


def seal(data: bytes) -> bytes:
    """The file ``data`` with its digest in place of ``EMPTY``."""
    place = _place(data)
    if place is None:
        raise ValueError(f"data: expected a safetensors file with {KEY!r} in its metadata, got none")
    return data[: place.start] + _digest(data, place).encode() + data[place.stop :]


def is_whole(data: bytes) -> bool:
    """Whether a file is as it was sealed; true of one that never was."""
    place = _place(data)
    return place is None or data[place.start : place.stop] == _digest(data, place).encode()


def seal_file(path: Path) -> None:
    path.write_bytes(seal(path.read_bytes()))


def _place(data: bytes) -> slice | None:
    """Where in the header the digest stands; None where there is none, or no header."""
    size = int.from_bytes(data[:8], "little")
    try:
        digest = json.loads(data[8 : 8 + size])["__metadata__"][KEY]
    except (KeyError, TypeError, ValueError):
        return None
    at = data.find(json.dumps(digest).encode(), 8, 8 + size) if isinstance(digest, str) else -1
    return None if at < 0 or len(digest) != len(EMPTY) else slice(at + 1, at + 1 + len(EMPTY))


def _digest(data: bytes, place: slice) -> str:
    total = hashlib.blake2b(digest_size=len(EMPTY) // 2)
    view = memoryview(data)
    for part in (view[: place.start], EMPTY.encode(), view[place.stop :]):
        total.update(part)
    return total.hexdigest()
