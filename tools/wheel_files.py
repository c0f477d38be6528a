"""What a wheel holds: metadata, RECORD, shared libraries."""

from __future__ import annotations

import base64
import csv
import email
import email.message
import hashlib
import io
import re
import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.shared_library import Library


class Wheel:
    def __init__(self, path: Path) -> None:
        self.path = path
        parts = path.name.removesuffix(".whl").split("-")
        if path.suffix != ".whl" or len(parts) != 5:
            raise SystemExit(f"WHEEL: expected NAME-VERSION-PYTHON-ABI-PLATFORM.whl, got {path.name}")
        self.name, self.version, *self.tag = parts
        self.archive = zipfile.ZipFile(path)
        self.members = [name for name in self.archive.namelist() if not name.endswith("/")]
        self.info = f"{self.name}-{self.version}.dist-info/"

    def read(self, member: str) -> bytes:
        return self.archive.read(member)

    def message(self, member: str) -> email.message.Message:
        return email.message_from_string(self.read(self.info + member).decode())

    @cached_property
    def metadata(self) -> email.message.Message:
        return self.message("METADATA")

    @cached_property
    def libraries(self) -> list[Library]:
        """Every ELF file, whatever its name."""
        from tools.shared_library import Library  # requires pyelftools, the rest does not

        found = ((name, self.read(name)) for name in self.members)
        return [Library(name, data) for name, data in found if data[:4] == b"\x7fELF"]

    @property
    def has_cuda(self) -> bool:
        return "fastgen/_cuda.so" in self.members

    def record(self) -> dict[str, tuple[str, str]]:
        """The rows of RECORD: path to hash and size."""
        rows = csv.reader(io.StringIO(self.read(self.info + "RECORD").decode()))
        return {path: (digest, size) for path, digest, size in rows}


def record_digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def version_key(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
