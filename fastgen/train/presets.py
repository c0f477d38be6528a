"""Presets: options for data that many people have, by name, in a size for CPUs and one for a GPU.

What depends on the image size comes from the model (``fastgen.models.sizes``); a preset adds what the data are like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GPU = "-gpu"
"""End of the names of the presets for a GPU, whose sizes have not been measured."""


@dataclass(frozen=True)
class Preset:
    """Options that replace defaults.

    Attributes:
        about: what the data are.
        data, train: fields of ``DataConfig`` and ``TrainConfig``.
        model: fields of a model's config, for the models that have them.
        gpu: whether the model's sizes are those for a GPU.
    """

    about: str
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    gpu: bool = False


ON_CPUS: Mapping[str, Preset] = {
    "mnist": Preset("handwritten digits or clothes, 28x28, grayscale", {"image_size": 28}),
    "emoji-64": Preset(
        "a few thousand drawings, 64x64, augmented", {"image_size": 64}, model={"augment": "color,translation,cutout"}
    ),
    "cifar-10": Preset("small photographs, 32x32, flipped", {"image_size": 32}, {"flip": True}),
    "celeba-64": Preset("faces, cropped and resized to 64x64, flipped", {"image_size": 64}, {"flip": True}),
}

PRESETS: Mapping[str, Preset] = {
    **ON_CPUS,
    **{
        name + GPU: Preset("the same for a GPU (not measured)", each.data, each.train, each.model, gpu=True)
        for name, each in ON_CPUS.items()
    },
}

KINDS = ("images", "pairs", "domains")
"""Kinds of data that presets are for."""


def find_preset(name: str) -> Preset:
    """Raises ValueError for a name that is no preset; "" is the preset without options."""
    if not name:
        return Preset("")
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
