"""Options of a dataset: its source, how it is cut, how it is split."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from fastgen.batch import option


@dataclass(frozen=True)
class DataConfig:
    """A dataset and how it is cut and split. An option that the source does not use must keep its default.

    Raises:
        ValueError: a number out of range. TypeError: a value of another type.
    """

    source: str = option("digits", "a bundled dataset, a path, or hf:NAME (fastgen data lists the bundled ones)")
    image_size: int = option(
        0, "size that images are resized to (shorter side) and center-cropped; size of patches (0: unchanged)"
    )
    held_out: int = option(0, "split ratio: one item in this many is held out (0: 5; 10 for text)")
    items: int = option(0, "number of items of a bundled dataset, held-out ones included (0: its default)")
    tokens: int = option(0, "vocabulary size of a tokenizer trained on the text (0: characters)")
    seconds: float = option(1.0, "length of the pieces that recordings are cut into, in seconds")
    column: str = option(
        "", "column of a Hugging Face dataset, or array of an .npz file (default: the only one that fits)"
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
            raise ValueError("source: expected a bundled dataset, a path or hf:NAME, got an empty string")
        if self.held_out == 1:
            raise ValueError("held_out: expected 2 or more (one item in so many), or 0, got 1")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)):
            raise TypeError(f"seconds: expected a number, got {self.seconds!r}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds: expected more than 0, got {self.seconds}")

    def refuse_unused(self, used: frozenset[str]) -> None:
        """ValueError where an option is set that the source does not use."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in used | {"source", "held_out"} and value != field.default:
                expected = f"{field.default!r}, as this source does not use it"
                raise ValueError(f"{self.source}: {field.name}: expected {expected}, got {value!r}")
