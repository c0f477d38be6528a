"""Tokens of data of kind "sequences": padding, start, end, then the characters of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

PADDING, START, END, FIRST = 0, 1, 2, 3
"""``FIRST`` is the first character of the vocabulary."""


def require_vocabulary(vocabulary: object) -> None:
    """Raises ValueError unless it is a string of distinct characters."""
    if not isinstance(vocabulary, str) or not vocabulary:
        raise ValueError(f"vocabulary: expected a string of at least one character, got {vocabulary!r}")
    repeated = sorted({c for c in vocabulary if vocabulary.count(c) > 1})
    if repeated:
        raise ValueError(f"vocabulary: expected distinct characters, got {''.join(repeated)!r} more than once")


def require_known(name: str, text: str, vocabulary: str) -> None:
    """Raises ValueError for a text with characters that the vocabulary lacks."""
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        raise ValueError(f"{name}: expected characters of the vocabulary, got {', '.join(map(repr, unknown))}")


def spell(tokens: Tensor | Iterable[int], vocabulary: str) -> str:
    """Decodes a row of tokens up to its end token, without start and padding."""
    text = ""
    for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
        if token == END:
            break
        text += vocabulary[token - FIRST] if token >= FIRST else ""
    return text
