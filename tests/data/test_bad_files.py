"""Bad files are rejected in one line that names the file, what was expected and what it holds."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_files import COLOR, GRAY, load, save_images, save_wav


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path: Path, *odd: bytes, name: str = "odd.png", good: int = 10) -> None:
    save_images(path, GRAY[:good])
    for data in odd:
        (path / name).write_bytes(data)


def npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def npy(array: Any) -> Callable[[Path], None]:
    return lambda path: np.save(path, array)


def many_sets(path: Path) -> None:
    path.mkdir()
    for name in "abcde":
        (path / f"{name}-train-images-idx3-ubyte").write_bytes(b"")


def idx(magic: int, shape: tuple[int, ...], size: int) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(struct.pack(f">{1 + len(shape)}I", magic, *shape) + bytes(size))


def written(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


def wav_format(number: int, data: bytes = bytes(400)) -> Callable[[Path], Any]:
    chunk = struct.pack("<HHIIHH", number, 1, 8000, 32000, 4, 32)
    head = b"WAVEfmt " + struct.pack("<I", len(chunk)) + chunk + b"data" + struct.pack("<I", 400) + data
    return written(b"RIFF" + struct.pack("<I", len(head)) + head)


def wavs(*rates: int, seconds: float = 3.0) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        for i, rate in enumerate(rates):
            save_wav(path / f"{i}.wav", [0] * int(rate * seconds), rate)

    return save


def mixed(path: Path) -> None:
    folder(path)
    save_images(path / "more", GRAY)


def two_sizes(path: Path) -> None:
    folder(path, png(GRAY[0][:4, :4]))


def splits(path: Path) -> None:
    for name in ("val", "test"):
        save_images(path / name, GRAY)


IDX = "images-idx3-ubyte"
BAD: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "array missing": ("a.npz", "images", npz(pictures=GRAY), "expected an array named 'images', got pictures"),
    "floats": ("a.npz", "images", npz(images=GRAY + 0.5), "expected uint8 pixels from 0 to 255, got float64"),
    "nan": ("a.npz", "images", npz(images=GRAY * np.nan), "got float64, 768 of them NaN or infinite"),
    "objects": ("a.npz", "images", npz(images=np.array([{}] * 10)), "expected an .npz file of plain arrays"),
    "dimensions": ("a.npz", "images", npz(images=GRAY[0]), "expected shape (N, H, W), (N, C, H, W) or (N, H, W, C)"),
    "channels": ("a.npz", "images", npz(images=GRAY[:, :2, None]), "with C 1 or 3, got (12, 2, 1, 8)"),
    "no images": ("a.npz", "images", npz(images=GRAY[:0]), "got (0, 8, 8)"),
    "too few": ("a.npz", "images", npz(images=GRAY[:3]), "images: expected at least 10 of them, got 3"),
    "not square": ("a.npz", "images", npz(images=GRAY[:, :4]), "expected square ones, got height 4 and width 8"),
    "labels": ("a.npz", "images", npz(images=GRAY, labels=np.zeros(3, int)), "expected shape (12,), got (3,)"),
    "float labels": ("a.npz", "images", npz(images=GRAY, labels=np.zeros(12)), "expected integers, got float64"),
    "large labels": ("a.npz", "images", npz(images=GRAY, labels=np.arange(12) * 9), "got 0 to 99"),
    "negative labels": ("a.npz", "images", npz(images=GRAY, labels=np.arange(12) - 1), "got -1 to 10"),
    "no npz": ("a.npz", "images", written(b"hello"), "expected an .npz file of plain arrays, got one that fails"),
    "one class for domains": ("a.npz", "domains", npz(images=GRAY), "expected data of kind domains"),
    "a small domain": (
        *("a.npz", "domains", npz(images=GRAY, labels=np.arange(12) % 2)),
        "images of domain a: expected at least 10 of them, got 6",
    ),
    "floats alone": ("a.npy", "images", npy(GRAY + 0.5), "a.npy: expected uint8 pixels from 0 to 255, got float64"),
    "dimensions alone": ("a.npy", "images", npy(GRAY[0]), "a.npy: expected shape (N, H, W), (N, C, H, W) or"),
    "a number as text": ("a.jsonl", "text", written(b'{"text": 5}'), "line 1: expected a string as text, got int"),
    "a number in a pair": (
        *("a.jsonl", "sequences", written(b'{"source": 5, "target": "a"}')),
        "line 1: expected a string as source, got int",
    ),
    "many sets": ("f", "images", many_sets, "a-train-images-idx3-ubyte, b-train-images-idx3-ubyte, c-train-images-"),
    "many sets, counted": ("f", "images", many_sets, "idx3-ubyte, ... (5): give one"),
    "idx of labels": (IDX, "images", idx(2049, (12,), 12), "expected the magic number 2051 of IDX images, got 2049"),
    "idx too short": (IDX, "images", idx(2051, (12, 8, 8), 767), "expected 768 bytes of images (12x8x8), got 767"),
    "idx too long": (IDX, "images", idx(2051, (12, 8, 8), 769), "expected 768 bytes of images (12x8x8), got more"),
    "idx of nothing": (IDX, "images", idx(2051, (0, 8, 8), 0), "expected images, got none (0x8x8)"),
    "idx empty": (IDX, "images", written(b"\0"), "expected the magic number 2051 of IDX images, got a file of 1 bytes"),
    "idx not zipped": (IDX + ".gz", "images", written(b"hello"), "expected an IDX file, got one that can't be read"),
    "empty folder": ("f", "images", Path.mkdir, "...), .txt, .wav or .flac files in it, got no"),
    "other files": ("f", "images", lambda p: folder(p, b"", name="a.md", good=0), "files in it, got 1 .md"),
    "one image": ("f", "images", lambda p: folder(p, good=1), "images: expected at least 10 of them, got 1"),
    "truncated": ("f", "images", lambda p: folder(p, png(COLOR[0])[:90]), "odd.png: expected an image, got one that"),
    "no image": ("f", "images", lambda p: folder(p, b"hello"), "odd.png: expected an image, got something else"),
    "empty image": ("f", "images", lambda p: folder(p, b""), "odd.png: expected an image, got an empty file"),
    "two sizes": ("f", "images", two_sizes, "expected images of one size, got 8x8 ("),
    "splits": ("f", "images", splits, "or train/ and test/ or val/, got test, val: give one of them"),
    "mixed": ("f", "images", mixed, "directly inside or in subfolders, one for each class, got both (00.png and more"),
    "a single image": ("a.png", "images", written(png(GRAY[0])), "expected a folder of images, got one file"),
    "unknown file": (
        "a.docx",
        "text",
        written(b"hello"),
        "expected a folder, an archive (.zip, .tar), or an .npz, .npy, IDX,",
    ),
    "binary text": (
        "a.txt",
        "text",
        written(b"abc\xff\xfe"),
        "expected UTF-8 text, got byte 0xff at offset 3, in line 1",
    ),
    "nul in text": (
        "a.txt",
        "text",
        written(b"abc\0"),
        "expected UTF-8 text, got binary data (a NUL at character 3, in line 1)",
    ),
    "empty text": ("a.txt", "text", written(b" \n"), "expected UTF-8 text, got an empty file"),
    "no tab": ("a.tsv", "sequences", written(b"a\tb\nc"), "line 2: expected source, one tab, target, got 0 tabs"),
    "no target": ("a.tsv", "sequences", written(b"a\t"), "line 1: expected source, one tab, target, got nothing on"),
    "one source": ("a.tsv", "sequences", written(b"a\tb\n" * 10), "different sources: expected at least 10 of them"),
    "compressed wav": (
        "a.wav",
        "audio",
        wav_format(7),
        "PCM (8, 16, 24 or 32 bits) or floats (32 or 64 bits), got mu-law",
    ),
    "truncated wav": ("a.wav", "audio", wav_format(1, bytes(300)), "a.wav: expected 100 samples, got 75: truncated?"),
    "no wav": ("a.wav", "audio", written(b"hello"), "a.wav: expected a WAV file of PCM"),
    "short wav": ("a.wav", "audio", wav_format(1), "pieces of 1 s (--seconds): expected at least 10 of them, got 1"),
    "an odd rate": ("f", "audio", wavs(8000, 8000, 1), "2.wav: expected a sample rate from 100 to 768000, got 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_rejected_in_one_line_that_names_them(tmp_path: Path, case: str) -> None:
    name, kind, make, message = BAD[case]
    make(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((TypeError, ValueError)) as caught:
        load(tmp_path / name, kind)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / name))
    assert message in text
    assert ": expected " in text
    assert ", got " in text
    assert "\n" not in text
    assert sorted(tmp_path.rglob("*")) == before
