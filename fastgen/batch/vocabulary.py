"""Vocabularies of text: a string, whose characters are the tokens, or strings, of which a text takes the longest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeAlias

Vocabulary: TypeAlias = str | tuple[str, ...]
"""Token i is item i. Every character of an item is an item itself, so that no text of known characters is stuck."""


def checked_vocabulary(vocabulary: object) -> Vocabulary:
    """A string, or a tuple for a list of strings. ValueError where items are empty, repeated, or their characters miss.

    >>> checked_vocabulary(["a", "b", "ab"])
    ('a', 'b', 'ab')
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


def tokenise(name: str, text: str, vocabulary: Sequence[str]) -> list[int]:
    """The text's tokens: from the left, always the longest item of the vocabulary that fits.

    >>> tokenise("text", "abba", ("a", "b", "ab"))
    [2, 1, 0]

    Raises:
        ValueError: the text, called ``name``, has characters that the vocabulary lacks.
    """
    number = {item: i for i, item in enumerate(vocabulary)}
    unknown = sorted(set(text) - number.keys())
    if unknown:
        raise ValueError(f"{name}: expected characters of the vocabulary, got {', '.join(map(repr, unknown))}")
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
