"""Data as sequences of steps, each a vector, for recurrent networks: rows of a picture, characters, pairs of texts.

Symbols are one-hot vectors. A source and its target are one sequence: the source's characters, an end, the target's, an
end, padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.batch import require_images, require_tokens
from fastgen.models._tokens import PADDING
from fastgen.models.base import Batch, Images, Samples, Texts, to_pixels

BLANK, STOP, CHARACTER = 0, 1, 2
"""Symbols of a pair: padding, the end of a side, and the vocabulary's first character."""


class Steps(ABC):
    """How data of a kind become sequences (B, length, width) and come back. symbols: whether steps are one-hot."""

    symbols: bool

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width

    @abstractmethod
    def read(self, batch: Batch) -> Tensor:
        """(B, length, width): int64 one-hot vectors of symbols, or numbers in [-1, 1]."""

    @abstractmethod
    def samples(self, steps: Tensor) -> Samples:
        """What a person looks at."""

    def judge(self, drawn: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Figures (B,) of drawn sequences, beside as many real ones."""
        return {}


class Rows(Steps):
    """Images (B, C, S, S) in [0, 1], row by row from the top: (B, S, C * S)."""

    symbols = False

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__(image_size, channels * image_size)
        self.channels = channels

    def read(self, batch: Batch) -> Tensor:
        images, size = batch["images"], self.length
        require_images("images", images, self.channels, size)
        return 2 * images.transpose(1, 2).flatten(2) - 1

    def samples(self, steps: Tensor) -> Images:
        rows = steps.unflatten(2, (self.channels, self.length)).transpose(1, 2)
        return Images(to_pixels(rows))


class Characters(Steps):
    """Pieces of text: tokens (B, length) int64."""

    symbols = True

    def __init__(self, vocabulary: str, length: int) -> None:
        super().__init__(length, len(vocabulary))
        self.vocabulary = vocabulary

    def read(self, batch: Batch) -> Tensor:
        return F.one_hot(_tokens(batch, "tokens", self.length, "(B, length)", self.width), self.width)

    def samples(self, steps: Tensor) -> Texts:
        return Texts(["".join(self.vocabulary[i] for i in row) for row in _symbols(steps)])

    def judge(self, drawn: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Shares of a text's triples of characters that occur in other real texts of the batch: drawn, and real."""
        drawn, real = (_triples(steps.argmax(2), self.width) for steps in (drawn, real))
        return {"known triples": _known(drawn, real), "known triples, real": _known(real, real)}


def _symbols(steps: Tensor) -> list[list[int]]:
    """Which symbol each step is. Raises ValueError for steps that are NaN, which are none."""
    largest, symbols = steps.max(2)
    if not bool(largest.isfinite().all()):
        raise ValueError("steps: expected numbers, got NaN or infinite ones; the generator's weights may be NaN")
    rows: list[list[int]] = symbols.tolist()
    return rows


def _triples(tokens: Tensor, width: int) -> Tensor:
    """A number for each three symbols in a row, (B, length - 2)."""
    return (tokens[:, :-2] * width + tokens[:, 1:-1]) * width + tokens[:, 2:]


def _known(triples: Tensor, real: Tensor) -> Tensor:
    """(B,): of the triples of row i, the share that real rows other than i have."""
    found, numbers = torch.cat((triples, real)).unique(return_inverse=True)
    triples, real = numbers.split((len(triples), len(real)))
    places = torch.arange(len(real), device=real.device)[:, None] * len(found) + real
    has = torch.zeros(len(real) * len(found), device=real.device).index_fill(0, places.flatten(), 1.0)
    has = has.view(len(real), -1)
    others = has.sum(0) - has
    return (others.gather(1, triples) > 0).double().mean(1)


class Pairs(Steps):
    """Sources (B, source_length) and targets (B, target_length): 1, characters from 3 on, 2, then padding with 0."""

    symbols = True

    def __init__(self, vocabulary: str, source_length: int, target_length: int) -> None:
        super().__init__(source_length + target_length - 2, CHARACTER + len(vocabulary))
        self.vocabulary, self.lengths = vocabulary, {"source": source_length, "target": target_length}

    def read(self, batch: Batch) -> Tensor:
        source, target = (
            _tokens(batch, name, length, f"(B, {name}_length)", self.width + 1)[:, 1:]
            for name, length in self.lengths.items()
        )
        place = (source != PADDING).sum(1, keepdim=True) + torch.arange(target.size(1), device=target.device)
        tokens = F.pad(source, (0, target.size(1))).scatter(1, place, target)
        return F.one_hot(tokens.masked_fill(tokens == PADDING, 1) - 1, self.width)

    def samples(self, steps: Tensor) -> Texts:
        """Texts "source -> target". What is not well formed shows further ends as "|", padding inside as "_"."""
        return Texts([self.spell(row) for row in _symbols(steps)])

    def spell(self, symbols: list[int]) -> str:
        while symbols and symbols[-1] == BLANK:
            symbols = symbols[:-1]
        if symbols.count(STOP) > 1 and symbols[-1] == STOP:
            symbols = symbols[:-1]
        characters = ("_", "|", *self.vocabulary)
        return "".join(characters[symbol] for symbol in symbols).replace("|", " -> ", 1)

    def judge(self, drawn: Tensor, real: Tensor) -> dict[str, Tensor]:
        """ "well formed": 1 for two sides of one character at least, each with its end, and nothing after; else 0."""
        symbols = drawn.argmax(2)
        ends = symbols == STOP
        sides = ends.cumsum(1) - ends.long()  # 0 up to the first end, 1 up to the second, 2 after that
        empty = ends & torch.cat((torch.ones_like(ends[:, :1]), ends[:, :-1]), 1)
        formed = (ends.sum(1) == 2) & ~empty.any(1) & ((symbols == BLANK) == (sides == 2)).all(1)
        return {"well formed": formed.double()}


def _tokens(batch: Batch, name: str, length: int, meaning: str, count: int) -> Tensor:
    tokens = batch[name]
    require_tokens(name, tokens, count, (*tokens.shape[:1], length), meaning)
    return tokens
