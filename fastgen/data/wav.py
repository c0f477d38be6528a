"""WAV files: PCM and floats, plain or extensible, RIFF or RF64.

Read here, as Python's ``wave`` refuses WAVE_FORMAT_EXTENSIBLE (ordinary recordings of 24 bits) before Python 3.12, and
floats in every version. Formats: "Multiple channel audio data and WAVE files" (Microsoft, 2007), EBU Tech 3306 (RF64).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgen.data._files import cannot_read, check_file
from fastgen.data.images import Array

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
NAMES = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x50: "MPEG", 0x55: "MP3"}
BITS = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
READABLE = "PCM (8, 16, 24 or 32 bits) or floats (32 or 64 bits)"
SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")
"""What follows the number of a format in the GUID of an extensible one."""

ENDLESS = 0xFFFFFFFF
UNKNOWN = frozenset((ENDLESS, 0x80000000, 0x7FFFFFFF, 0x7FFFF000))
"""Sizes that programs write which can't go back to the header: ffmpeg, arecord, and sox."""


class Format(NamedTuple):
    """width: bytes of a sample, of which PCM uses the upper bits. frame: bytes of a sample of every channel."""

    kind: int
    channels: int
    rate: int
    width: int

    @property
    def frame(self) -> int:
        return self.channels * self.width


def read_wav(path: Path) -> tuple[Tensor, int]:
    """((samples,) float32 in [-1, 1], samples a second), channels averaged.

    The upper end of PCM of n bits is 2^(n-1); unused low bits of a container (20 bits in 24) are its fraction. Floats
    are taken as they are. Where a header leaves the length open (0 or 0xFFFFFFFF: written to a pipe), the samples go on
    to the end of the file.

    Raises:
        ValueError: another format, a damaged header, fewer samples than it says, floats that are not finite or beyond
            [-1, 1]. OSError: it can't be read. Both name the file.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            layout = _layout(path, file)
            data = _data(path, file, layout)
    except OSError as error:
        raise cannot_read(path, error) from error
    frames = _samples(path, np.frombuffer(data, np.uint8), layout).reshape(-1, layout.channels)
    return torch.from_numpy(frames.mean(1, dtype=np.float64).astype(np.float32)), layout.rate


def _layout(path: Path, file: BinaryIO) -> Format:
    """The format; leaves the file at the size of the data chunk. See ``_data`` for the sizes."""
    head = file.read(12)
    if len(head) < 12 or head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        got = "an empty file" if not head else f"a file that begins with {head[:12]!r}"
        raise ValueError(f"{path}: expected a WAV file of {READABLE}, got {got}")
    found: Format | None = None
    while True:
        chunk = file.read(8)
        if len(chunk) < 8:
            missing = "data" if found else "format"
            raise ValueError(f"{path}: expected a WAV file with samples, got one without {missing}: truncated?")
        name, size = chunk[:4], _uint(chunk[4:])
        if name == b"data":
            if found is None:
                raise ValueError(f"{path}: expected a WAV file whose format comes before its data, got data first")
            file.seek(-8, 1)
            return found
        start = file.tell()
        if name == b"fmt ":
            found = _format(path, file.read(min(size, 40)))
        file.seek(start + size + size % 2)  # chunks begin at even places


def _format(path: Path, chunk: bytes) -> Format:
    """The chunk "fmt "."""
    if len(chunk) < 16:
        raise ValueError(f"{path}: expected a format of 16 bytes or more, got {len(chunk)}")
    kind, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", chunk[:16])
    if kind == EXTENSIBLE:
        if len(chunk) < 40:
            raise ValueError(f"{path}: expected an extensible format of 40 bytes, got {len(chunk)}")
        valid = int.from_bytes(chunk[18:20], "little")
        if chunk[26:40] != SUBFORMAT:
            raise ValueError(
                f"{path}: expected a WAV file of {READABLE}, got the extensible format {chunk[24:40].hex()}"
            )
        if valid > bits:
            raise ValueError(f"{path}: expected at most {bits} valid bits in samples of {bits}, got {valid}")
        kind = int.from_bytes(chunk[24:26], "little")
    if kind not in BITS:
        got = NAMES.get(kind, f"format {kind}")
        raise ValueError(f"{path}: expected a WAV file of {READABLE}, got {got}")
    width = -(-bits // 8)
    if 8 * width not in BITS[kind] or (kind == FLOAT and bits % 8):
        what = "floats" if kind == FLOAT else "PCM"
        raise ValueError(f"{path}: expected a WAV file of {READABLE}, got {what} of {bits} bits")
    if not channels or not rate:
        raise ValueError(f"{path}: expected a channel or more and a sample rate, got {channels} and {rate}")
    if frame != channels * width:
        raise ValueError(
            f"{path}: expected {channels * width} bytes for {channels} samples of {bits} bits, got {frame}: damaged?"
        )
    return Format(kind, channels, rate, width)


def _data(path: Path, file: BinaryIO, layout: Format) -> bytes:
    """The bytes of whole frames. The file is at the data chunk."""
    start = file.tell() + 8
    rest = file.seek(0, 2) - start
    file.seek(0)
    head = file.read(min(start, 36))
    file.seek(start - 4)
    size, riff = _uint(file.read(4)), _uint(head[4:8])
    if head[:4] != b"RIFF" and head[12:16] == b"ds64" and len(head) >= 36:  # sizes of 64 bits
        riff = riff if riff != ENDLESS else _uint(head[20:28])
        size = size if size != ENDLESS else _uint(head[28:36])
    # A size of 0 is no size where the file as a whole has none, or ends before the samples that follow.
    is_open = (size in UNKNOWN and size > rest) or (size == 0 and (riff in UNKNOWN or riff + 8 <= start))
    if is_open:
        size = rest
    n = size // layout.frame
    whole = n * layout.frame
    if not n or whole > rest:
        got = max(0, min(rest, size)) // layout.frame
        raise ValueError(f"{path}: expected {n or 'some'} samples, got {got}: truncated?")
    return file.read(whole)


def _samples(path: Path, data: Array, layout: Format) -> Array:
    """Bytes -> values in [-1, 1], of every channel in turn."""
    raw = data.reshape(-1, layout.width)
    if layout.kind == FLOAT:
        values: Array = raw.view(f"<f{layout.width}")[:, 0].astype(np.float64)
        wrong = int((~np.isfinite(values)).sum())
        if wrong:
            raise ValueError(f"{path}: expected finite samples, got {wrong} that are NaN or infinite")
        low, high = float(values.min()), float(values.max())
        if low < -1 or high > 1:
            raise ValueError(
                f"{path}: expected samples from -1 to 1, got {low:.6g} to {high:.6g}: make the recording quieter"
            )
        return values
    if layout.width == 1:
        return (raw[:, 0].astype(np.float64) - 128) / 128
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - layout.width :] = raw  # the sample's bytes on top of a 32-bit number
    return (wide.view("<i4")[:, 0] >> (32 - 8 * layout.width)) / 2.0 ** (8 * layout.width - 1)


def _uint(data: bytes) -> int:
    return int.from_bytes(data, "little")
