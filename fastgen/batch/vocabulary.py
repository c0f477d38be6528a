"""Tokens: vocabularies of text, special tokens of sequences, and captions.

Three numberings: text numbers the items of its vocabulary from 0; sequences number characters from ``FIRST``, after
``PADDING``, ``START`` and ``END``; captions number characters from 1, after ``PADDING``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

PADDING, START, END, FIRST = 0, 1, 2, 3
"""Tokens of sequences; ``FIRST`` is the first character of the vocabulary."""

Vocabulary: TypeAlias = str | tuple[str, ...]
"""Token i is item i: a character of a string, or a string of a tuple.

Every character that occurs in an item is an item itself, so any text of known characters can be tokenized.
"""


def check_vocabulary(vocabulary: object) -> Vocabulary:
    """The vocabulary, a list of strings as a tuple.

    >>> check_vocabulary(["a", "b", "ab"])
    ('a', 'b', 'ab')

    Raises:
        ValueError: items that are empty or repeated, or a character of an item that is no item itself.
    """
    if (
        not vocabulary
        or not isinstance(vocabulary, (str, list, tuple))
        or not all(isinstance(item, str) and item for item in vocabulary)
    ):
        raise ValueError(f"vocabulary: expected characters in a string, or a list of strings, got {vocabulary!r}")
    known = set(vocabulary)
    if len(known) < len(vocabulary):
        repeated = sorted({item for item in known if vocabulary.count(item) > 1})
        raise ValueError(f"vocabulary: expected distinct items, got {', '.join(map(repr, repeated))} more than once")
    missing = sorted(set("".join(vocabulary)) - known)
    if missing:
        raise ValueError(f"vocabulary: expected every character of its items as an item, got none for {missing[0]!r}")
    return vocabulary if isinstance(vocabulary, str) else tuple(vocabulary)


def require_characters(vocabulary: object) -> None:
    """Raises ValueError unless the vocabulary is a string of distinct characters."""
    if not isinstance(vocabulary, str) or not vocabulary:
        raise ValueError(f"vocabulary: expected a string of at least one character, got {vocabulary!r}")
    repeated = sorted({character for character in vocabulary if vocabulary.count(character) > 1})
    if repeated:
        raise ValueError(f"vocabulary: expected distinct characters, got {''.join(repeated)!r} more than once")


def require_known(name: str, text: str, vocabulary: Sequence[str]) -> None:
    """Raises ValueError where the text has characters that the vocabulary lacks."""
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        raise ValueError(f"{name}: expected characters of the vocabulary, got {', '.join(map(repr, unknown))}")


def tokenize(name: str, text: str, vocabulary: Sequence[str]) -> list[int]:
    """Tokens of a text: from left to right, the longest item of the vocabulary that matches.

    >>> tokenize("text", "abba", ("a", "b", "ab"))
    [2, 1, 0]

    Raises:
        ValueError: the text, called ``name``, has characters that the vocabulary lacks.
    """
    require_known(name, text, vocabulary)
    number = {item: i for i, item in enumerate(vocabulary)}
    found: defaultdict[str, set[int]] = defaultdict(set)
    for item in number:
        found[item[0]].add(len(item))
    lengths = {first: sorted(sizes, reverse=True) for first, sizes in found.items()}
    tokens, at = [], 0
    while at < len(text):
        for length in lengths[text[at]]:
            token = number.get(text[at : at + length])
            if token is not None:
                tokens.append(token)
                at += length
                break
    return tokens


def detokenize(tokens: Tensor | Iterable[int], vocabulary: str) -> str:
    """The text of a source or target sequence (S,), up to its end, without start and padding."""
    text = ""
    for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
        if token == END:
            break
        text += vocabulary[token - FIRST] if token >= FIRST else ""
    return text


def caption_tokens(captions: Sequence[str], vocabulary: str, length: int) -> Tensor:
    """(N, length) int64: token 1 + i is character i of the vocabulary, ``PADDING`` follows at the end.

    Raises:
        ValueError: a caption that is too long, or has characters that the vocabulary lacks.
    """
    number = {character: 1 + i for i, character in enumerate(vocabulary)}
    tokens = torch.full((len(captions), length), PADDING)
    for row, caption in zip(tokens, captions, strict=True):
        require_known("caption", caption, vocabulary)
        if len(caption) > length:
            raise ValueError(f"caption: expected at most {length} characters, as in the data, got {len(caption)}")
        row[: len(caption)] = torch.tensor([number[character] for character in caption])
    return tokens
