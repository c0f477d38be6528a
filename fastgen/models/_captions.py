"""Captions of pictures as tokens: 0 is padding, 1 + i character i of their vocabulary."""

from __future__ import annotations

from torch import Tensor

from fastgen.batch import caption_tokens as caption_rows
from fastgen.batch import require_tokens

__all__ = ["caption_rows", "check_captions"]


def check_captions(captions: Tensor | None, batch: int, length: int, count: int) -> None:
    """Raises TypeError, ValueError unless they are (batch, length) int64, from 0 to count - 1."""
    if captions is None:
        raise ValueError(f"caption: expected (B, {length}) int64, as the model is told captions, got none")
    require_tokens("caption", captions, count, (batch, length), "(B, caption_length)")
