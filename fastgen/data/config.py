"""What a person chooses of the data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how they are cut and split. An option that the source has no use for must keep its default.

    Raises:
        ValueError: a number out of range. TypeError: not a number where one is due.
    """

    source: str = _option("digits", "a bundled data set, a path, or hf:NAME (fastgen data lists them)")
    image_size: int = _option(
        0, "resize the shorter side to this and crop the centre; of patches, their size (0: as is)"
    )
    held_out: int = _option(0, "one item in this many is held out of training (0: 5; of text 10)")
    items: int = _option(0, "how many items a bundled data set has, held-out ones included (0: its own number)")
    tokens: int = _option(0, "read text by a vocabulary of so many strings, learnt from it (0: by characters)")
    seconds: float = _option(1.0, "length of the pieces that recordings are cut into")
    column: str = _option(
        "", "column of a Hugging Face data set, or array of an .npz file (default: the one that fits)"
    )

    def __post_init__(self) -> None:
        for name in ("image_size", "held_out", "items", "tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected a whole number, got {value!r}")
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        for name in ("source", "column"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a string, got {getattr(self, name)!r}")
        if not self.source:
            raise ValueError("source: expected a bundled data set, a path or hf:NAME, got an empty string")
        if self.held_out == 1:
            raise ValueError("held_out: expected 2 or more (one item in so many), or 0, got 1")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)):
            raise TypeError(f"seconds: expected a number, got {self.seconds!r}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")

    def refuse_unused(self, used: frozenset[str]) -> None:
        """ValueError where an option that only some sources have is set for one that has it not."""
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name not in used | {"source", "held_out"} and value != option.default:
                expected = f"{option.default!r}, as it has no use for it"
                raise ValueError(f"{self.source}: {option.name}: expected {expected}, got {value!r}")
