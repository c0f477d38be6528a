"""Samples of a run over time, read from its folder and reduced to the size of one page."""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.train.sample_files import TEXT_SEPARATOR

REAL = "real"
"""Name of the training images that are shown beside samples; their step is 0."""

MOST_STEPS = 24
PAGE_BYTES = 9_000_000
"""Total size of the files of a page, before base64 adds a third."""

LATEST_SHARE = 0.3  # share of the last step in the bytes of one history
TEXT_BYTES = 32_768  # read of a file of texts
WIDEST = 760  # CSS pixels
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FILE = re.compile(r"(\d{6,18})\.(png|txt|wav)")


@dataclass(frozen=True)
class StepSamples:
    """Samples of one step: an image, or texts, or audio with a plot of its waveforms. URIs hold the data."""

    step: int
    image: str = ""
    width: int = 0
    """CSS pixels; small images are ``enlarged`` by an integer factor."""
    enlarged: bool = False
    audio: str = ""
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleHistory:
    """Samples of one name over time, the latest step first. count: number of steps in the folder."""

    name: str
    steps: list[StepSamples]
    count: int


def read_samples(folder: Path) -> list[SampleHistory]:
    """The samples of a run's folder, "samples" and real images first; subfolders and files that are links are left
    out."""
    found: dict[str, dict[int, dict[str, Path]]] = {}
    for place in sorted(folder.iterdir()):
        if place.is_symlink() or not place.is_dir():
            continue
        for file in place.iterdir():
            match = FILE.fullmatch(file.name)
            if match and file.is_file() and not file.is_symlink():
                found.setdefault(place.name, {}).setdefault(int(match[1]), {})[match[2]] = file
    allowance = PAGE_BYTES // max(1, len(found))
    order = sorted(found, key=lambda name: (name != "samples", name != REAL, name))
    return [SampleHistory(name, _frames(found[name], allowance), len(found[name])) for name in order]


def data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _frames(files: dict[int, dict[str, Path]], allowance: int) -> list[StepSamples]:
    """The steps, reduced to about ``allowance`` bytes in total, the latest first."""
    steps = _evenly(sorted(files), MOST_STEPS)
    sounds = [files[step]["wav"].stat().st_size for step in steps if "wav" in files[step]]
    if sounds:  # audio is not compressed, only thinned
        steps = _evenly(steps, allowance // 2 // max(sounds))
        allowance //= 2
    latest = int(allowance * LATEST_SHARE)
    rest = (allowance - latest) // max(1, len(steps) - 1)
    frames = (_frame(step, files[step], latest if step == steps[-1] else rest) for step in reversed(steps))
    return [frame for frame in frames if frame is not None]


def _evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, evenly spaced, always with the last one."""
    if len(steps) <= most:
        return list(steps)
    if most <= 1:
        return list(steps[-1:])
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _frame(step: int, files: dict[str, Path], allowance: int) -> StepSamples | None:
    """None if no file can be displayed."""
    image, width, enlarged = _image(files["png"].read_bytes(), allowance) if "png" in files else ("", 0, False)
    fits = "wav" in files and files["wav"].stat().st_size <= PAGE_BYTES
    audio = data_uri("audio/wav", files["wav"].read_bytes()) if fits else ""
    texts = _texts(files["txt"]) if "txt" in files else ()
    return StepSamples(step, image, width, enlarged, audio, texts) if image or audio or texts else None


def _image(data: bytes, allowance: int) -> tuple[str, int, bool]:
    """URI, width in CSS pixels, and whether it is enlarged; above ``allowance`` bytes a smaller JPEG; "" if no PNG."""
    if data[:8] != PNG_SIGNATURE or len(data) < 24:
        return "", 0, False
    (width,) = struct.unpack(">I", data[16:20])
    shown = width * max(1, WIDEST // max(1, width))
    if len(data) <= allowance:
        return data_uri("image/png", data), shown, shown > width
    smaller = _smaller(data, allowance)
    return data_uri("image/jpeg", smaller) if smaller else "", min(shown, WIDEST), False


def _smaller(data: bytes, allowance: int) -> bytes:
    """A JPEG of at most ``allowance`` bytes; b"" if the image can't be read."""
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
