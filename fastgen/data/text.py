"""Text: windows of characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Dataset, Items, digest
from fastgen.data.splitting import HELD_OUT_TEXT, at_least

OVERLAP = 8
"""How many training windows each character lies in."""


class Windows(Items):
    """Windows of ``length`` tokens that start every ``stride`` tokens, as long as they fit.

    Args:
        tokens: (N,) integers, N at least ``length``.
    """

    def __init__(self, tokens: Tensor, length: int, stride: int) -> None:
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.length) // self.stride + 1

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        starts = indices.to(self.tokens.device) * self.stride
        within = torch.arange(self.length, device=self.tokens.device)
        return {"tokens": self.tokens[starts[:, None] + within].long()}

    def to(self, device: torch.device | str) -> Windows:
        return Windows(self.tokens.to(device), self.length, self.stride)


def text_dataset(name: str, text: str, every: int) -> Dataset:
    """Kind text. The vocabulary is the text's characters, sorted; the last tenth (or 1 / ``every``) is held out.

    ``splits(length=...)`` gives windows of so many characters. Held-out windows do not overlap, and the characters
    at the end that fill none are left out. Training windows start every max(1, length // 8) characters: an epoch
    sees each character about eight times, each time after another stretch of the past.

    Raises:
        ValueError: an empty text; from ``splits``: a text too short for one window in either part.
    """
    at_least(name, len(text), "characters")
    tokens, vocabulary = encode(text)
    cut = len(text) - max(1, len(text) // (every or HELD_OUT_TEXT))
    train, held = tokens[:cut], tokens[cut:]

    def make_splits(length: int) -> tuple[Items, Items]:
        if length < 1:
            raise ValueError(f"length: expected 1 or more characters, got {length}")
        if len(held) < length or len(train) < length:
            raise ValueError(
                f"{name}: expected a text with {length} characters or more to train on and {length} or more held out, "
                f"got {len(train)} and {len(held)}"
            )
        return Windows(train, length, max(1, length // OVERLAP)), Windows(held, length, length)

    about = {"characters": (len(train), len(held))}
    fingerprint = digest("text", vocabulary, tokens, cut)
    return Dataset(name, "text", {"vocabulary": vocabulary}, fingerprint, make_splits, about)


def encode(text: str) -> tuple[Tensor, str]:
    """((N,) int32 numbers of its characters in the vocabulary, the vocabulary)."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    used, tokens = np.unique(codes, return_inverse=True)
    return torch.from_numpy(tokens.reshape(-1).astype(np.int32)), "".join(map(chr, used.tolist()))


def read_text(path: Path) -> str:
    """A UTF-8 file, line ends as LF. ValueError names the first byte that is none."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path}: expected UTF-8 text, got {got}") from error
    if "\0" in text:
        raise ValueError(f"{path}: expected UTF-8 text, got binary data (a NUL at character {text.index(chr(0))})")
    if not text.strip():
        raise ValueError(f"{path}: expected UTF-8 text, got an empty file")
    return text.replace("\r\n", "\n")


def read_texts(paths: list[Path]) -> str:
    """Several files, one after the other, with a line end between."""
    return "\n".join(read_text(path) for path in paths)


def prose() -> str:
    """The documentation of Python's language, from its standard library.

    Topics in sorted order; a paragraph that another topic had before is left out, so that hardly a held-out sentence
    occurs in training. The text differs between versions of Python; the fingerprint tells.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: list[str] = []
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept) + "\n"
