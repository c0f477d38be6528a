"""What a run showed over time, read back from its folder and made small enough for one page."""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.train.pictures import TEXT_SEPARATOR

MOST_FRAMES = 24
PAGE_BYTES = 9_000_000
"""Of all files of a page together, before they grow by a third in base64."""

LATEST_SHARE = 0.3  # of the bytes of one series of samples, for its last frame
TEXT_BYTES = 32_768  # of a file of texts
WIDEST = 760  # CSS pixels of a picture
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FILE = re.compile(r"(\d{6,18})\.(png|txt|wav)")


@dataclass(frozen=True)
class Frame:
    """What was shown at a step: a picture, or texts, or a sound with a picture of its waves. URIs hold the data."""

    step: int
    picture: str = ""
    width: int = 0
    """CSS pixels: small pictures are ``enlarged`` by a whole number."""
    enlarged: bool = False
    sound: str = ""
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shown:
    """Samples over time: the latest frame first. ``count``: how many steps there are in the folder."""

    name: str
    frames: list[Frame]
    count: int


def read_samples(folder: Path) -> list[Shown]:
    """The samples of a run's folder, "samples" first; subfolders and files that are links are left out."""
    found: dict[str, dict[int, dict[str, Path]]] = {}
    for place in sorted(folder.iterdir()):
        if place.is_symlink() or not place.is_dir():
            continue
        for file in place.iterdir():
            match = FILE.fullmatch(file.name)
            if match and file.is_file() and not file.is_symlink():
                found.setdefault(place.name, {}).setdefault(int(match[1]), {})[match[2]] = file
    allowance = PAGE_BYTES // max(1, len(found))
    order = sorted(found, key=lambda name: (name != "samples", name))
    return [Shown(name, _frames(found[name], allowance), len(found[name])) for name in order]


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _frames(files: dict[int, dict[str, Path]], allowance: int) -> list[Frame]:
    """Frames of about ``allowance`` bytes in all, the latest first."""
    steps = _evenly(sorted(files), MOST_FRAMES)
    sounds = [files[step]["wav"].stat().st_size for step in steps if "wav" in files[step]]
    if sounds:  # they can't be made smaller, only fewer
        steps = _evenly(steps, allowance // 2 // max(sounds))
        allowance //= 2
    latest = int(allowance * LATEST_SHARE)
    rest = (allowance - latest) // max(1, len(steps) - 1)
    frames = (_frame(step, files[step], latest if step == steps[-1] else rest) for step in reversed(steps))
    return [frame for frame in frames if frame is not None]


def _evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, and at least the last; the first and the last among them if there is room."""
    if len(steps) <= most:
        return list(steps)
    if most <= 1:
        return list(steps[-1:])
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _frame(step: int, files: dict[str, Path], allowance: int) -> Frame | None:
    """None if there is nothing that a page could show."""
    picture, width, enlarged = _picture(files["png"].read_bytes(), allowance) if "png" in files else ("", 0, False)
    fits = "wav" in files and files["wav"].stat().st_size <= PAGE_BYTES
    sound = data_uri("audio/wav", files["wav"].read_bytes()) if fits else ""
    texts = _texts(files["txt"]) if "txt" in files else ()
    return Frame(step, picture, width, enlarged, sound, texts) if picture or sound or texts else None


def _picture(data: bytes, allowance: int) -> tuple[str, int, bool]:
    """URI, width in CSS pixels, and whether it is enlarged; above ``allowance`` bytes a smaller JPEG; "" for no PNG."""
    if data[:8] != PNG_SIGNATURE or len(data) < 24:
        return "", 0, False
    (width,) = struct.unpack(">I", data[16:20])
    shown = width * max(1, WIDEST // max(1, width))
    if len(data) <= allowance:
        return data_uri("image/png", data), shown, shown > width
    smaller = _smaller(data, allowance)
    return data_uri("image/jpeg", smaller) if smaller else "", min(shown, WIDEST), False


def _smaller(data: bytes, allowance: int) -> bytes:
    """A JPEG of at most ``allowance`` bytes; nothing if the picture can't be read."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return b""
    image.thumbnail((2 * WIDEST, 8 * WIDEST))
    while True:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=85)
        if buffer.tell() <= allowance or min(image.size) < 32:
            return buffer.getvalue()
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))


def _texts(file: Path) -> tuple[str, ...]:
    with open(file, "rb") as opened:
        data = opened.read(TEXT_BYTES + 1)
    text = data[:TEXT_BYTES].decode("utf-8", errors="replace") + (" …" if len(data) > TEXT_BYTES else "")
    return tuple(part.strip("\n") for part in text.split(f"\n{TEXT_SEPARATOR}\n"))
