"""A prebuilt CUDA library for a session, and whether it is of these sources.

usage: python -m benchmarks.gpu.prebuilt FOLDER [--arch 9.0a]
builds the libraries and copies them to FOLDER with the digest of the sources. A session takes them from the folder in
FASTGEN_PREBUILT, shared/prebuilt or build/prebuilt, if the digest is that of its own sources. The libraries serve every
Python and every torch from 2.10 on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.session import ROOT

LIBRARIES = ("_cpu.so", "_cuda.so")
PLACES = ("shared/prebuilt", "build/prebuilt")


def digest(root: Path = ROOT) -> str:
    """Of everything that the libraries are built from."""
    files = [path for path in sorted((root / "csrc").rglob("*")) if path.is_file()]
    found = hashlib.sha256()
    for path in [*files, root / "tools" / "build_libraries.py"]:
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def save(folder: Path, root: Path = ROOT) -> None:
    """Copies the built libraries to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LIBRARIES:
        shutil.copy2(root / "fastgen" / name, folder / name)
    (folder / "prebuilt.json").write_text(json.dumps({"digest": digest(root)}) + "\n")


def why_not(folder: Path, root: Path = ROOT) -> str | None:
    """Why a folder's libraries do not serve these sources; None if they do."""
    missing = [name for name in (*LIBRARIES, "prebuilt.json") if not (folder / name).is_file()]
    if missing:
        return f"{folder} has no {', '.join(missing)}"
    if json.loads((folder / "prebuilt.json").read_text())["digest"] != digest(root):
        return f"{folder} is of other sources"
    return None


def take(root: Path = ROOT) -> tuple[Path | None, list[str]]:
    """Installs prebuilt libraries in place. The folder that they are from, or None and the reasons why not."""
    given = os.environ.get("FASTGEN_PREBUILT")
    reasons = []
    for folder in [Path(given)] if given else [root / place for place in PLACES]:
        reason = why_not(folder, root)
        if reason is None:
            for name in LIBRARIES:
                shutil.copy2(folder / name, root / "fastgen" / name)
            return folder, []
        reasons.append(reason)
    return None, reasons


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="9.0a", help="TORCH_CUDA_ARCH_LIST; default: 9.0a")
    arguments = parser.parse_args()
    environment = {**os.environ, "FASTGEN_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arguments.arch}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment, check=True)
    save(arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
