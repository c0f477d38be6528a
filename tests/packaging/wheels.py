"""Small wheels for the tests of tools/check_wheel.py: a library of a few lines, and what a release adds to it."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from tools.build_libraries import DTYPES

TAG = "py3-none-manylinux_2_34_x86_64"
VERSION = "0.1.0"
COMPILER = shutil.which("cc") or shutil.which("gcc")
LIBRARY = r"""
#define EXPORTED __attribute__((visibility("default")))
extern unsigned long long aoti_torch_abi_version(void);
EXPORTED const char* fastgen_build_info(void) { return INFO; }
EXPORTED unsigned long long fastgen_abi(void) { return aoti_torch_abi_version(); }
"""


def compile_library(
    path: Path, source: str, *flags: str, info: dict[str, object] | None = None, stripped: bool = True
) -> bytes:
    text = json.dumps(json.dumps(info or {}))  # a string literal in C, too
    code = path.with_suffix(".c")
    code.write_text(source.replace("INFO", text), encoding="utf-8")
    command = [COMPILER, "-shared", "-fPIC", "-fvisibility=hidden", *(["-s"] if stripped else []), "-o", path, code]
    subprocess.run([*map(str, command), *flags], check=True, capture_output=True)
    return path.read_bytes()


def build_info(local: str, cuda: str | None = None, architectures: tuple[str, ...] = ()) -> dict[str, object]:
    built = {"version": f"{VERSION}+{local}" if local else VERSION, "torch": "2.13.0", "dtypes": [*DTYPES]}
    return {**built, "cuda": cuda, "architectures": [*architectures], "compiler": "cc"}


@dataclass
class Parts:
    """A wheel before it is written; tests change one part."""

    folder: Path
    local: str = "cpu"
    tag: str = TAG
    libraries: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    record: dict[str, str | None] = field(default_factory=dict)  # rows that differ; None: left out

    @property
    def version(self) -> str:
        return f"{VERSION}+{self.local}" if self.local else VERSION

    @property
    def info(self) -> str:
        return f"fastgen-{self.version}.dist-info/"

    def __post_init__(self) -> None:
        missing = {"cuda": "FASTGEN_BUILD=cpu"} if self.local == "cpu" else {}
        report = {"mode": "cpu", "version": self.version, "built": ["cpu"], "missing": missing}
        metadata = [
            "Metadata-Version: 2.4",
            "Name: fastgen",
            f"Version: {self.version}",
            "Summary: layers",
            "Requires-Python: >=3.10",
            "License-Expression: Apache-2.0",
            "License-File: LICENSE",
            "License-File: csrc/THIRD_PARTY_NOTICES",
            "Description-Content-Type: text/markdown",
        ]
        self.files = {
            "fastgen/__init__.py": "",
            "fastgen/version.py": f"__version__ = {self.version!r}\n",
            "fastgen/_build_report.json": json.dumps(report),
            f"{self.info}METADATA": "\n".join([*metadata, "", "# fastgen", ""]),
            f"{self.info}WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {self.tag}\n",
            f"{self.info}licenses/LICENSE": "Apache License\n",
            f"{self.info}licenses/csrc/THIRD_PARTY_NOTICES": "NVIDIA: libcudart_static.a\n",
            **self.files,
        }

    def write(self) -> Path:
        path = self.folder / f"fastgen-{self.version}-{self.tag}.whl"
        contents = {**self.libraries, **{name: text.encode() for name, text in self.files.items()}}
        rows = {name: record_row(name, data) for name, data in contents.items()} | self.record
        record = f"{self.info}RECORD"
        lines = [row for row in rows.values() if row is not None] + [f"{record},,"]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
            archive.writestr(record, "\n".join(lines) + "\n")
        return path


def record_row(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
    return f"{name},sha256={digest},{len(data)}"
