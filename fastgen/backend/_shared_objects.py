"""Checks of a shared library before it is loaded: loading a truncated one kills the process with SIGBUS, and one of
another version registers operators that do not fit.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from fastgen.version import __version__

_HEADER, _SEGMENT = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_VERSION = b"fastgen_version"
"""Name of the section with the version, of csrc/common/build_info.cpp."""


def why_incomplete(path: Path) -> str | None:
    """What a 64-bit little-endian ELF file lacks, by its header; None for a complete file and any other kind."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if not b"\x7fELF\x02\x01".startswith(head[:6]):
            return None
        if len(head) < _HEADER.size:
            return f"it has {size} bytes, fewer than an ELF header"
        _, _, _, _, _, segments, sections, _, _, entry, count, section_entry, section_count, _ = _HEADER.unpack(head)
        ends = [sections + section_entry * section_count, segments + entry * count]
        file.seek(segments)
        table = file.read(entry * count)
    for start in range(0, len(table) - _SEGMENT.size + 1, max(entry, _SEGMENT.size)):
        _, _, offset, _, _, in_file, _, _ = _SEGMENT.unpack_from(table, start)
        ends.append(offset + in_file)
    return None if max(ends) <= size else f"it has {size} bytes of {max(ends)}: build or install fastgen again"


def why_of_another_version(path: Path) -> str | None:
    """Which version of fastgen a complete ELF library is of, where that is not this one; None for any other kind of
    file, whose version is known once it is loaded.

    Local parts of versions (0.1.0+cu130) may differ.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or head[:6] != b"\x7fELF\x02\x01":
            return None
        found = _version_in(file, head)
    if found is None:
        return f"{path.name} is of another version of fastgen: build or install fastgen again"
    if found.partition("+")[0] != __version__.partition("+")[0]:
        return f"{path.name} is of fastgen {found}, and this is {__version__}: build or install fastgen again"
    return None


def _version_in(file: BinaryIO, head: bytes) -> str | None:
    *_, sections, _, _, _, _, entry, count, names_at = _HEADER.unpack(head)
    if entry < _SECTION.size or names_at >= count:
        return None
    file.seek(sections)
    table = file.read(entry * count)
    found = [_SECTION.unpack_from(table, start) for start in range(0, len(table) - _SECTION.size + 1, entry)]
    names = _content(file, found[names_at])
    for section in found:
        if names[section[0] :].startswith(_VERSION + b"\0"):
            return _content(file, section).rstrip(b"\0").decode(errors="replace")
    return None


def _content(file: BinaryIO, section: tuple[int, ...]) -> bytes:
    _, _, _, _, offset, size, *_ = section
    file.seek(offset)
    return file.read(size)
