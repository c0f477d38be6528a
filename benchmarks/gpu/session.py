"""Folder, clock and results of a session, and whether it is a rehearsal.

A rehearsal (``FASTGEN_GPU_REHEARSAL=1``) runs the same programs without a GPU: the emulator takes the place of the
card, shapes are small, a few tests of each family run, and every result says ``"rehearsal": true``. Its times mean
nothing.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = os.environ.get("FASTGEN_GPU_REHEARSAL", "") not in ("", "0")


class Session:
    """The results of one session: lines of JSON, each written when it is known.

    Args:
        folder: where results.jsonl is.
        limit: seconds that the call may take.
    """

    def __init__(self, folder: Path, limit: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.limit, self.start = folder, limit, time.monotonic()
        self.file = folder / "results.jsonl"

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.limit - (time.monotonic() - self.start)

    def write(self, kind: str, **row: Any) -> dict[str, Any]:
        """Appends a row, and returns it."""
        line = {"kind": kind, "at_s": round(time.monotonic() - self.start, 1), **row}
        if REHEARSAL:
            line["rehearsal"] = True
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def rows(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows so far, those of earlier calls included."""
        if not self.file.is_file():
            return []
        rows = [json.loads(line) for line in self.file.read_text().splitlines()]
        return [row for row in rows if kind in (None, row["kind"])]


def machine() -> dict[str, Any]:
    """The machine and the software of the results."""
    import torch

    import fastgen

    found: dict[str, Any] = {"versions": fastgen.info().as_dict()["versions"], "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return found
