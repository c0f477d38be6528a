"""Captions of pictures as tokens: 0 is padding, 1 + i character i of their vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen.batch import require_tokens
from fastgen.models._tokens import require_known


def caption_rows(captions: Sequence[str], vocabulary: str, length: int) -> Tensor:
    """(n, length) int64. ValueError: one that is too long, or has characters that the vocabulary lacks."""
    rows = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in zip(rows, captions, strict=True):
        require_known("caption", caption, vocabulary)
        if len(caption) > length:
            raise ValueError(f"caption: expected at most {length} characters, as in the data, got {len(caption)}")
        row[: len(caption)] = torch.tensor([1 + vocabulary.index(character) for character in caption])
    return rows


def check_captions(captions: Tensor | None, batch: int, length: int, count: int) -> None:
    """Raises TypeError, ValueError unless they are (batch, length) int64, from 0 to count - 1."""
    if captions is None:
        raise ValueError(f"caption: expected (B, {length}) int64, as the model is told captions, got none")
    require_tokens("caption", captions, count, (batch, length), "(B, caption_length)")
