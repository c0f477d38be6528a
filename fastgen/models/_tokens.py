"""Characters as tokens, as data of kind "sequences" number them, and the choice of a token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

PADDING, START, END, FIRST = 0, 1, 2, 3
"""``FIRST`` is the vocabulary's first character."""


def require_vocabulary(vocabulary: object) -> None:
    """ValueError for what is no string of distinct characters."""
    if not isinstance(vocabulary, str) or not vocabulary:
        raise ValueError(f"vocabulary: expected a string of at least one character, got {vocabulary!r}")
    repeated = sorted({c for c in vocabulary if vocabulary.count(c) > 1})
    if repeated:
        raise ValueError(f"vocabulary: expected distinct characters, got {''.join(repeated)!r} more than once")


def require_known(name: str, text: str, vocabulary: str) -> None:
    """ValueError for a text with characters that the vocabulary lacks."""
    unknown = sorted(set(text) - set(vocabulary))
    if unknown:
        raise ValueError(f"{name}: expected characters of the vocabulary, got {', '.join(map(repr, unknown))}")


def spell(tokens: Tensor | Iterable[int], vocabulary: str) -> str:
    """The text of a row of tokens, up to its end, without start and padding."""
    text = ""
    for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
        if token == END:
            break
        text += vocabulary[token - FIRST] if token >= FIRST else ""
    return text


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token of each row: logits (B, tokens) -> (B,) int64. 0: the likeliest. A CPU generator serves every device.

    The largest of logits + Gumbel noise is a sample of their softmax (Gumbel 1954; Maddison et al. 2014).
    """
    if temperature == 0:
        return logits.argmax(1)
    device = logits.device if generator is None else generator.device
    uniform = torch.rand(logits.shape, generator=generator, device=device).to(logits.device)
    return (logits.float() / temperature - uniform.log().neg().log()).argmax(1)
