"""Check of a shared library before it is loaded: loading a truncated one kills the process with SIGBUS."""

from __future__ import annotations

import struct
from pathlib import Path

_HEADER, _SEGMENT = struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")


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
