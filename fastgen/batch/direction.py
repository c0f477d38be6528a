"""Directions of translation, in both spellings that are in use: of data (AtoB) and of domains (a-to-b)."""

from __future__ import annotations

from typing import Any, Literal, get_args

Direction = Literal["AtoB", "BtoA", "a-to-b", "b-to-a"]


def is_reversed(direction: Any) -> bool:
    """Whether the direction is from b to a.

    Raises:
        ValueError: unknown direction.
    """
    if direction not in get_args(Direction):
        raise ValueError(f"direction: expected one of {', '.join(get_args(Direction))}, got {direction!r}")
    return direction in ("BtoA", "b-to-a")
