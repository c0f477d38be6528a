"""WAV files of every layout that recorders write, against samples that are known by construction."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from fastgen.data.wav import FLOAT, PCM, SUBFORMAT, read_wav

SAMPLES = {"<i2": (-32768, 16384, 0, -1), "<f4": (-1.0, 0.5, 0.0, 1.0), "<f8": (-1.0, 0.5, 0.0, 0.1)}


def chunk(name: bytes, data: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(data) if size is None else size) + data + b"\0" * (len(data) % 2)


def layout(kind: int = PCM, bits: int = 16, channels: int = 1, *, valid: int | None = None, frame: int = 0) -> bytes:
    """The chunk "fmt "; an extensible one where ``valid`` bits are given."""
    width = frame or channels * -(-bits // 8)
    head = struct.pack("<HHIIHH", kind if valid is None else 0xFFFE, channels, 8000, 8000 * width, width, bits)
    more = b"" if valid is None else struct.pack("<HHIH", 22, valid, 4, kind) + SUBFORMAT
    return chunk(b"fmt ", head + more)


def riff(*chunks: bytes, name: bytes = b"RIFF", size: int | None = None) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return name + struct.pack("<I", len(body) if size is None else size) + body


def pcm(*values: int, width: int) -> bytes:
    return b"".join((value + 128 * (width == 1)).to_bytes(width, "little", signed=width > 1) for value in values)


def read(tmp_path: Path, data: bytes) -> list[float]:
    (tmp_path / "a.wav").write_bytes(data)
    wave, rate = read_wav(tmp_path / "a.wav")
    assert (wave.dtype, rate) == (torch.float32, 8000)
    return wave.tolist()


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_pcm_of_every_width_is_read_plain_and_extensible(tmp_path: Path, width: int, extensible: bool) -> None:
    top = 2 ** (8 * width - 1)
    data = chunk(b"data", pcm(-top, top // 2, 0, -top // 4, -top // 2, width=width))  # an odd number of bytes
    form = layout(bits=8 * width, valid=8 * width if extensible else None)
    assert read(tmp_path, riff(form, data)) == [-1, 0.5, 0, -0.25, -0.5]


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("bits", [32, 64])
def test_floats_are_taken_as_they_are(tmp_path: Path, bits: int, extensible: bool) -> None:
    values = SAMPLES[f"<f{bits // 8}"]
    data = chunk(b"data", struct.pack(f"<4{'f' if bits == 32 else 'd'}", *values))
    form = layout(FLOAT, bits, valid=bits if extensible else None)
    assert read(tmp_path, riff(form, data)) == torch.tensor(values).tolist()


def test_bits_that_fill_no_byte_lie_at_the_top_of_their_container(tmp_path: Path) -> None:
    data = chunk(b"data", pcm(1 << 22, -(1 << 23), width=3))
    assert read(tmp_path, riff(layout(bits=24, valid=20), data)) == [0.5, -1]
    assert read(tmp_path, riff(layout(bits=20), data)) == [0.5, -1]


def test_channels_are_averaged_whatever_their_number(tmp_path: Path) -> None:
    values = pcm(-32768, 0, 24576, 0, 0, 0, 8192, 8192, 8192, 8192, 8192, 8192, width=2)
    assert read(tmp_path, riff(layout(channels=6, valid=16), chunk(b"data", values))) == pytest.approx([-1 / 24, 0.25])


def test_other_chunks_are_skipped_with_their_padding(tmp_path: Path) -> None:
    odd, fact = chunk(b"LIST", b"INFOabc"), chunk(b"fact", struct.pack("<I", 4))
    data = chunk(b"data", struct.pack("<4h", *SAMPLES["<i2"]))
    after = chunk(b"LIST", b"data" + bytes(3))
    assert read(tmp_path, riff(odd, layout(), fact, odd, data, after)) == [-1, 0.5, 0, -(2**-15)]


@pytest.mark.parametrize(
    ("data_size", "riff_size"),
    [(0xFFFFFFFF, 0xFFFFFFFF), (0, 0), (0, 36), (0x7FFFF000, 0x7FFFF024), (0, 0xFFFFFFFF)],
)
def test_a_length_that_a_pipe_left_open_goes_to_the_end_of_the_file(
    tmp_path: Path, data_size: int, riff_size: int
) -> None:
    data = chunk(b"data", struct.pack("<4hb", *SAMPLES["<i2"], 1)[:9], data_size)[:-1]  # half a sample at the end
    assert read(tmp_path, riff(layout(), data, size=riff_size)) == [-1, 0.5, 0, -(2**-15)]


@pytest.mark.parametrize("name", [b"RF64", b"BW64"])
def test_sizes_of_64_bits_are_read(tmp_path: Path, name: bytes) -> None:
    large = chunk(b"ds64", struct.pack("<QQQI", 80, 8, 4, 0))
    data = chunk(b"data", struct.pack("<4h", *SAMPLES["<i2"]), 0xFFFFFFFF)
    after = chunk(b"LIST", bytes(20))  # no samples, as ds64 says
    whole = riff(large, layout(), data, after, name=name, size=0xFFFFFFFF)
    assert read(tmp_path, whole) == [-1, 0.5, 0, -(2**-15)]


DATA = chunk(b"data", bytes(8))
BAD = {
    "empty": (b"", "got an empty file"),
    "big endian": (riff(layout(), DATA, name=b"RIFX"), "got a file that begins with b'RIFX"),
    "no data": (riff(layout()), "expected a WAV file with samples, got one without data: truncated?"),
    "no format": (riff(), "expected a WAV file with samples, got one without format: truncated?"),
    "data first": (riff(DATA, layout()), "got data first"),
    "short format": (riff(chunk(b"fmt ", bytes(14)), DATA), "expected a format of 16 bytes or more, got 14"),
    "short extensible": (
        riff(chunk(b"fmt ", layout(valid=16)[8:34]), DATA),
        "an extensible format of 40 bytes, got 26",
    ),
    "GUID": (riff(layout(valid=16).replace(SUBFORMAT, bytes(14)), DATA), "got the extensible format 01000000"),
    "extensible mu-law": (riff(layout(7, 8, valid=8), DATA), "got mu-law"),
    "unknown format": (riff(layout(0x1234), DATA), "got format 4660"),
    "half floats": (riff(layout(FLOAT, 16), DATA), "got floats of 16 bits"),
    "PCM of 64 bits": (riff(layout(bits=64), DATA), "got PCM of 64 bits"),
    "PCM of no bits": (riff(layout(bits=0, frame=2), DATA), "got PCM of 0 bits"),
    "no channels": (riff(layout(channels=0, frame=2), DATA), "expected a channel or more and a sample rate, got 0"),
    "frame": (riff(layout(channels=2, frame=2), DATA), "expected 4 bytes for 2 samples of 16 bits, got 2: damaged?"),
    "valid bits": (riff(layout(valid=17), DATA), "expected at most 16 valid bits in samples of 16, got 17"),
    "truncated": (riff(layout(), chunk(b"data", bytes(6), 8)), "expected 4 samples, got 3: truncated?"),
    "no samples": (riff(layout(), chunk(b"data", b""), chunk(b"LIST", bytes(8))), "expected some samples, got 0"),
    "NaN": (riff(layout(FLOAT, 32), chunk(b"data", struct.pack("<2f", 0, float("nan")))), "got 1 that are NaN"),
    "loud": (riff(layout(FLOAT, 32), chunk(b"data", struct.pack("<2f", -1, 1.5))), "from -1 to 1, got -1 to 1.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_files_are_rejected_in_one_line(tmp_path: Path, case: str) -> None:
    data, message = BAD[case]
    with pytest.raises(ValueError, match=r"expected .* got ") as caught:
        read(tmp_path, data)
    assert str(caught.value).startswith(str(tmp_path / "a.wav"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
