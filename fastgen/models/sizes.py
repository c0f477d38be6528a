"""Defaults that follow the data: a model's width, steps, batch size and averages for images of a size.

Each model of images has a table ``sizes`` with a row for images of up to 32 pixels and one for larger ones, and two
more for a GPU; its other defaults are for images of up to 16 pixels. The rows were chosen for two CPU cores and 10,000
images of 28x28, or a few thousand of 64x64, from the times of single steps: about ten CPU minutes for autoencoders,
twenty to thirty for GANs and Transformers. The results page has whole runs on a CPU; those on a GPU have not been
measured.
``GenerativeModel.suggested`` turns a row into options; those that the user gives override them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Scale: TypeAlias = Literal["small", "medium", "large"]
Row: TypeAlias = Literal["small", "medium", "large", "medium, gpu", "large, gpu"]

SMALL, MEDIUM = 16, 32
"""Largest height of images that count as small, and as medium."""

USUAL_ITEMS = 10_000
MOST_MORE = 4.0
"""Steps grow with the square root of the number of items beyond ``USUAL_ITEMS``, by at most this factor."""

FEW_ITEMS = 5_000
"""Number of training images below which GANs augment the input of the discriminator."""

LEAST_STEPS = 200

LONG: Mapping[str, Any] = {"average_decay": 0.999}
DECAY: Mapping[str, Any] = {"schedule": "cosine"}
SLOWER: Mapping[str, Any] = {"generator_learning_rate": 3e-4, "discriminator_learning_rate": 3e-4}
"""Options of several models: of long runs, of runs whose learning rate decays, of larger convolutional GANs."""


@dataclass(frozen=True)
class DataSize:
    """What defaults depend on.

    Attributes:
        kind: kind of the data.
        items: number of training items.
        image_size, channels, levels: of images; 0 for other kinds.
        gpu: whether the options are for a GPU.
    """

    kind: str
    items: int
    image_size: int = 0
    channels: int = 0
    levels: int = 0
    gpu: bool = False

    @property
    def scale(self) -> Scale:
        if self.image_size <= SMALL:
            return "small"
        return "medium" if self.image_size <= MEDIUM else "large"

    @property
    def row(self) -> Row:
        """The row of a table ``sizes``; small images have one for all devices."""
        if self.scale == "small" or not self.gpu:
            return self.scale
        return "medium, gpu" if self.scale == "medium" else "large, gpu"

    def __str__(self) -> str:
        size = f" of {self.image_size}x{self.image_size}x{self.channels}" if self.image_size else ""
        return f"{self.items:,} items{size}"


@dataclass(frozen=True)
class Size:
    """A row of a model's table.

    Attributes:
        steps: number of training steps for up to ``USUAL_ITEMS`` items.
        batch_size: items in a batch.
        passes: most passes over the data, for models that overfit; 0: no limit.
        train: further options of training, by name.
        model: options of the model, by name.
    """

    steps: int
    batch_size: int = 64
    passes: float = 0.0
    train: Mapping[str, Any] | None = None
    model: Mapping[str, Any] | None = None

    def options(self, data: DataSize) -> dict[str, Any]:
        """Options as the command line names them: "steps", "model.width"."""
        model = dict(self.model or {})
        if "num_downsamples" in model:
            model["num_downsamples"] = min(model["num_downsamples"], downsamplings(data.image_size))
        chosen = {"steps": self.steps_for(data), "batch_size": self.batch_size, **(self.train or {})}
        return chosen | {f"model.{name}": value for name, value in model.items()}

    def steps_for(self, data: DataSize) -> int:
        steps = self.steps * min(MOST_MORE, max(1.0, math.sqrt(data.items / USUAL_ITEMS)))
        if self.passes:
            steps = max(LEAST_STEPS, min(steps, self.passes * data.items / self.batch_size))
        return self.steps if steps == self.steps else two_digits(steps)


def two_digits(value: float) -> int:
    """The number rounded to two significant digits."""
    digits = 1 - math.floor(math.log10(value))
    return int(round(value, min(0, digits)))


def downsamplings(size: int) -> int:
    """How often a positive size can be divided by 2."""
    return (size & -size).bit_length() - 1
