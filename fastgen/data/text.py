"""Text: windows of tokens, which are characters or longer strings."""

from __future__ import annotations

import codecs
import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.batch import Vocabulary, tokenize
from fastgen.data._base import Dataset, Items, Source, digest
from fastgen.data._files import read_bytes
from fastgen.data._optional import need
from fastgen.data.config import DataConfig
from fastgen.data.splitting import HELD_OUT_TEXT, at_least

LONG_LINE = 40
"""Characters of a line that hardly occurs twice by chance."""

OVERLAP = 8
"""Number of training windows that each token is in."""

PIECES = r" ?\S+|\s+"
LONGEST = 16
"""Learned strings end at the latest with the word, with the white space between words, or after so many characters."""


class TextFiles(Source):
    """UTF-8 files, one after the other, with a line end between. ``test``: the source of the held-out text."""

    kinds = ("text",)
    options = frozenset(("tokens", "test_data"))

    def __init__(self, config: DataConfig, paths: list[Path]) -> None:
        self.config, self.paths = config, paths
        self.test: TextFiles | None = None

    def read(self) -> str:
        return "\n".join(read_text(path) for path in self.paths)

    def load(self, kind: str) -> Dataset:
        if self.test and self.config.held_out:
            raise ValueError(
                f"{self.config.source}: held_out: expected 0, as the data have a held-out split of their own, "
                f"got {self.config.held_out}"
            )
        text, test = self.read(), self.test.read() if self.test else ""
        data = text_dataset(self.config.source, text, self.config.held_out, self.config.tokens, test)
        note = _also_trained_on(text, test)
        return dataclasses.replace(data, warnings=(note,)) if note else data


def _also_trained_on(text: str, test: str) -> str:
    """A warning where held-out text occurs in the training text; "" where it does not."""
    if test.strip() and test.strip() in text:
        return "the held-out text is also trained on"
    lines = [line for line in test.split("\n") if len(line) >= LONG_LINE]
    known = {*text.split("\n")} if lines else set()
    leaked = sum(line in known for line in lines)
    return f"{leaked:,} of {len(lines):,} long held-out lines are also trained on" if leaked else ""


class Windows(Items):
    """Windows of ``length`` tokens that start every ``stride`` tokens, as long as they fit.

    Args:
        tokens: (N,) integers, N at least ``length``.
    """

    def __init__(self, tokens: Tensor, length: int = 1, stride: int = 1) -> None:
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self) -> int:
        return (len(self.tokens) - self.length) // self.stride + 1

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        indices = indices.to(self.tokens.device)
        starts = torch.where(indices < 0, indices + len(self), indices) * self.stride  # -1: the last window
        within = torch.arange(self.length, device=self.tokens.device)
        return {"tokens": self.tokens[starts[:, None] + within].long()}

    def to(self, device: torch.device | str) -> Windows:
        return Windows(self.tokens.to(device), self.length, self.stride)


class TextDataset(Dataset):
    """Text. Its items are single tokens until ``splits`` cuts windows."""

    def splits(self, length: int | None = None) -> tuple[Items, Items]:
        """Windows of ``length`` tokens.

        Held-out windows do not overlap, and the tokens at the end that fill none are left out. Training windows start
        every max(1, length // 8) tokens, so an epoch has each token about eight times, in different contexts.

        Raises:
            ValueError: a text too short for one window in either split.
        """
        assert isinstance(self.train, Windows)
        assert isinstance(self.held_out, Windows)
        train, held = self.train.tokens, self.held_out.tokens
        unit = "characters" if isinstance(self.facts["vocabulary"], str) else "tokens"
        if length is None or length < 1:
            raise ValueError(f"length: expected 1 or more {unit}, got {length}")
        if len(held) < length or len(train) < length:
            raise ValueError(
                f"{self.name}: expected a text with {length} {unit} or more to train on and {length} or more held out, "
                f"got {len(train)} and {len(held)}"
            )
        return Windows(train, length, max(1, length // OVERLAP)), Windows(held, length, length)


def text_dataset(name: str, text: str, every: int, count: int = 0, test: str = "") -> TextDataset:
    """Kind text. The last tenth (or 1 / ``every``) of the text is held out, or all of ``test``, if there is one.

    The vocabulary is the text's characters, sorted. With ``count``, frequent strings of the training split are added,
    up to ``count`` items altogether; the longest item that matches is then one token.

    Raises:
        ValueError: an empty text; a count that is not above the number of distinct characters.
        ImportError: a count without the package ``tokenizers``.
    """
    at_least(name, len(text), "characters")
    cut = len(text) if test else len(text) - max(1, len(text) // (every or HELD_OUT_TEXT))
    text += test
    tokens, characters = encode(text)
    vocabulary: Vocabulary = characters
    train, held = tokens[:cut], tokens[cut:]
    if count:
        vocabulary = learn_strings(name, text[:cut], characters, count)
        train, held = (
            torch.tensor(tokenize(name, part, vocabulary), dtype=torch.int32) for part in (text[:cut], text[cut:])
        )
    fingerprint = digest("text", vocabulary, tokens, cut)
    return TextDataset(name, "text", {"vocabulary": vocabulary}, fingerprint, Windows(train), Windows(held))


def learn_strings(name: str, text: str, characters: str, count: int) -> tuple[str, ...]:
    """The characters, then the strings that byte-pair encoding merges.

    Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units" (2016).
    """
    if count <= len(characters):
        raise ValueError(f"tokens: expected more than {name} has characters, {len(characters)}, got {count}")
    library = need("tokenizers", "tokenizers", "tokens")
    learner = library.Tokenizer(library.models.BPE())
    learner.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(PIECES), "isolated")
    trainer = library.trainers.BpeTrainer(
        vocab_size=count,
        min_frequency=2,
        initial_alphabet=list(characters),
        max_token_length=LONGEST,
        show_progress=False,
    )
    learner.train_from_iterator([text], trainer)
    number: dict[str, int] = learner.get_vocab()
    strings = sorted(number.keys() - set(characters), key=number.__getitem__)
    return (*characters, *strings)


def encode(text: str) -> tuple[Tensor, str]:
    """((N,) int32 numbers of its characters in the vocabulary, the vocabulary)."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    used, tokens = np.unique(codes, return_inverse=True)
    return torch.from_numpy(tokens.reshape(-1).astype(np.int32)), "".join(map(chr, used.tolist()))


def read_text(path: Path) -> str:
    """A UTF-8 file, without a byte order mark. Line ends (LF, CR LF and CR, nothing else) become LF.

    Raises:
        ValueError: not UTF-8 (names the first byte that is not, and its line), a NUL, nothing but white space.
        OSError: it can't be read.
    """
    return decode_text(read_bytes(path), str(path))


def decode_text(data: bytes, path: str) -> str:
    """As ``read_text``, of the contents of a file; ``path`` is for messages."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]  # valid UTF-8
        line = _line_ends_as_lf(before.decode("utf-8", errors="replace")).count("\n") + 1
        wide = ": UTF-16?" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}, in line {line}{wide}"
        raise ValueError(f"{path}: expected UTF-8 text, got {got}") from error
    text = _line_ends_as_lf(text)
    if "\0" in text:
        at = text.index("\0")
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{path}: expected UTF-8 text, got binary data (a NUL at character {at}, in line {line})")
    if not text.strip():
        raise ValueError(f"{path}: expected UTF-8 text, got an empty file")
    return text


def _line_ends_as_lf(text: str) -> str:
    """Unlike ``str.splitlines``, which also splits at U+2028, U+0085, form feeds, ..."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def prose() -> str:
    """The documentation of Python's language, from its standard library.

    Topics in sorted order; a paragraph that an earlier topic has is left out, so that hardly a held-out sentence
    occurs in training. The text differs between versions of Python, and so does the fingerprint.
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
