"""A static package index of a folder of wheels, one for each local version (PEP 503), for any web server.

usage: python tools/make_index.py FOLDER_OF_WHEELS OUT [--base-url URL]

Writes OUT/whl/cu130/index.html and OUT/whl/cu130/fastgen/index.html for wheels such as fastgen-0.1.0+cu130-..., and
OUT/whl/public/... for those without a local version; beside each wheel its METADATA (PEP 658), so that pip resolves
without downloading the wheel. Links begin with URL, where the wheels and their .metadata files are served; without
--base-url they are relative, for a server of a folder that holds both.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import os
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.wheel_files import Wheel

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="pypi:repository-version" content="1.1"><title>{title}</title></head>
<body>
<h1>{title}</h1>
{links}
</body>
</html>
"""


def page(title: str, links: list[str]) -> str:
    return PAGE.format(title=html.escape(title), links="\n".join(f"{link}<br>" for link in links))


def link(wheel: Wheel, base: str) -> str:
    """An anchor with the hash of the file, the Python versions and the hash of the METADATA, which is written too."""
    data, metadata = wheel.path.read_bytes(), wheel.read(wheel.info + "METADATA")
    wheel.path.with_name(wheel.path.name + ".metadata").write_bytes(metadata)
    digest = f"sha256={hashlib.sha256(metadata).hexdigest()}"
    attributes = {
        "href": f"{base}/{quote(wheel.path.name)}#sha256={hashlib.sha256(data).hexdigest()}",
        "data-requires-python": wheel.metadata["Requires-Python"] or "",
        "data-core-metadata": digest,
        "data-dist-info-metadata": digest,  # the name before PEP 714
    }
    text = " ".join(f'{name}="{html.escape(value)}"' for name, value in attributes.items() if value)
    return f"<a {text}>{html.escape(wheel.path.name)}</a>"


def write_index(folder: Path, out: Path, base_url: str | None) -> dict[str, list[str]]:
    """The names of the wheels by local version."""
    groups: dict[str, list[Wheel]] = defaultdict(list)
    for path in sorted(folder.glob("*.whl")):
        wheel = Wheel(path)
        groups[wheel.version.partition("+")[2] or "public"].append(wheel)
    for local, wheels in groups.items():
        names = sorted({wheel.name for wheel in wheels})
        root = out / "whl" / local
        for name in names:
            place = root / name.replace("_", "-").lower()
            place.mkdir(parents=True, exist_ok=True)
            base = base_url or Path(os.path.relpath(folder, place)).as_posix()
            links = [link(wheel, base) for wheel in wheels if wheel.name == name]
            (place / "index.html").write_text(page(f"Links for {name} ({local})", links), encoding="utf-8")
        links = [f'<a href="{name.replace("_", "-").lower()}/">{name}</a>' for name in names]
        (root / "index.html").write_text(page(f"Packages ({local})", links), encoding="utf-8")
    return {local: [wheel.path.name for wheel in wheels] for local, wheels in groups.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="a static package index of a folder of wheels")
    parser.add_argument("folder", type=Path, metavar="FOLDER_OF_WHEELS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--base-url", metavar="URL", help="address of the folder of wheels")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir() or not any(options.folder.glob("*.whl")):
        parser.error(f"FOLDER_OF_WHEELS: expected a folder with wheels, got {options.folder}")
    if options.base_url is not None and urlsplit(options.base_url).scheme not in ("http", "https"):
        parser.error(f"--base-url: expected an http or https address, got {options.base_url}")
    found = write_index(
        options.folder.resolve(), options.out.resolve(), options.base_url and options.base_url.rstrip("/")
    )
    for local, names in found.items():
        print(f"{options.out}/whl/{local}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
