"""Sampling options: the class of a conditional model, the temperature of a latent; the labels of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastgen.batch import require_labels
from fastgen.checks import require_not_negative
from fastgen.models.base import Batch, option

MAX_COLUMNS = 32
TEMPERATURE = "standard deviation of the latent z; lower: less varied, 0: always the same sample"


@dataclass(frozen=True)
class LabelOptions:
    """Sampling options of class-conditional models.

    Raises:
        ValueError: label is less than -1.
    """

    label: int = option(-1, "class to sample, by number or name; -1: all classes in turn")

    def __post_init__(self) -> None:
        if isinstance(self.label, bool) or not isinstance(self.label, int) or self.label < -1:
            raise ValueError(f"label: expected a class 0, 1, ... or -1 for all in turn, got {self.label!r}")


@dataclass(frozen=True)
class LatentOptions:
    """Sampling options of models with a latent z from N(0, 1).

    Raises:
        ValueError: temperature is negative, infinite or NaN.
    """

    temperature: float = option(1.0, TEMPERATURE)

    def __post_init__(self) -> None:
        require_not_negative(temperature=self.temperature)


@dataclass(frozen=True)
class LabeledLatentOptions(LabelOptions):
    """Sampling options of class-conditional models with a latent z from N(0, 1).

    Raises:
        ValueError: label is less than -1; temperature is negative, infinite or NaN.
    """

    temperature: float = option(1.0, TEMPERATURE)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(temperature=self.temperature)


def tempered_noise(noise: Tensor, options: Any) -> Tensor:
    """Noise from N(0, 1) with ``options.temperature`` as its standard deviation; as it is for other options."""
    temperature = getattr(options, "temperature", 1.0)
    return noise if temperature == 1 else temperature * noise


def has_classes(config: Any) -> bool:
    """Whether the model of a config samples the classes of labels."""
    classes = getattr(config, "num_classes", getattr(config, "classes", 0))
    return bool(classes and getattr(config, "conditional", True))


def check_labels(batch: Batch, classes: int) -> Tensor:
    """The batch's labels. Raises TypeError, ValueError unless they are (B,) int64, from 0 to classes - 1."""
    labels = batch.get("labels")
    items = batch["audio" if "audio" in batch else "images"]
    require_labels("labels", labels, len(items), classes)
    return cast(Tensor, labels)


def wanted_labels(n: int, label: int, classes: int) -> tuple[Tensor, int | None]:
    """Labels (n,) int64 to sample, and the number of columns if each class has its own column.

    Raises:
        ValueError: there is no such class.
    """
    if label >= classes:
        raise ValueError(f"label: expected -1 or a class below {classes}, got {label}")
    if label >= 0:
        return torch.full((n,), label), None
    return torch.arange(n) % classes, classes if classes <= min(n, MAX_COLUMNS) else None
