"""Options of a dataset: its source, how it is cut, how it is split."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastgen.batch import Direction, is_reversed, option

Binarize = Literal["none", "static", "dynamic"]

RATES = 100, 768_000
"""Sample rates of recordings, the lowest and the highest."""


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
        "", "column of a table or of JSON Lines, or array of an .npz file (default: the only one that fits)"
    )
    test_data: str = option("", "path of the held-out items (default: the data's own test split, or held_out)")
    binarize: Binarize = option(
        "none", "black and white pixels, drawn with their values as probabilities: once, or in each training step"
    )
    skip_broken: bool = option(False, "images and recordings that can't be read are left out, with a warning")
    direction: Direction = option("AtoB", "direction of translation of pairs; BtoA or b-to-a exchanges both sides")
    sample_rate: int = option(0, "sample rate that recordings are resampled to (0: the one most of them have)")

    def __post_init__(self) -> None:
        for name in ("image_size", "held_out", "items", "tokens", "sample_rate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected a whole number, got {value!r}")
            if value < 0:
                raise ValueError(f"{name}: expected 0 or more, got {value}")
        if self.sample_rate and not RATES[0] <= self.sample_rate <= RATES[1]:
            raise ValueError(f"sample_rate: expected {RATES[0]} to {RATES[1]}, or 0, got {self.sample_rate}")
        if self.binarize not in get_args(Binarize):
            raise ValueError(f"binarize: expected one of {', '.join(get_args(Binarize))}, got {self.binarize!r}")
        object.__setattr__(self, "direction", "BtoA" if is_reversed(self.direction) else "AtoB")
        if not isinstance(self.skip_broken, bool):
            raise TypeError(f"skip_broken: expected true or false, got {self.skip_broken!r}")
        for name in ("source", "column", "test_data"):
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
