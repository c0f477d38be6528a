"""The bundled datasets. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Dataset, Source
from fastgen.data._optional import need
from fastgen.data.audio import tones
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import (
    ImageStack,
    from_pixels,
    image_dataset,
    pair_dataset,
    split_domains,
    split_images,
)
from fastgen.data.images import decode
from fastgen.data.sequences import reversal, sums
from fastgen.data.splitting import HELD_OUT, at_least
from fastgen.data.text import prose, text_dataset

SOURCES: Mapping[str, str] = {
    "digits": "images: 1797 handwritten digits, 8x8, grayscale, 10 classes (scikit-learn)",
    "textures": "domains, images: patches of grass and gravel, grayscale (scikit-image)",
    "photos": "images, pairs (grayscale to color): patches of two photographs (scikit-learn)",
    "prose": "text: the documentation of Python's language (standard library)",
    "reversal": "sequences: random strings, reversed",
    "sums": 'sequences: "12+345" to "357"',
    "tones": "audio: plucked and blown tones, 8000 samples per second, 96 classes",
}
"""Names of the bundled datasets: their kinds and contents."""

BUNDLED = "bundled:"
"""Prefix of a bundled dataset's name, for where a file or folder has the same name."""

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PATCH = 32
PATCHES = 4000


class BundledSource(Source):
    """The bundled dataset that ``config.source`` names."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.loaders, self.options = LOADERS[config.source]
        self.kinds = tuple(self.loaders)

    def load(self, kind: str) -> Dataset:
        return self.loaders[kind](self.config)


def digits(config: DataConfig) -> Dataset:
    """1797 handwritten digits of 8x8 pixels with 17 levels, in 10 classes.

    A pixel counts the ink in a 4x4 block of the scan: Alpaydin and Kaynak, "Optical recognition of handwritten
    digits", 1998.
    """
    data = need("sklearn.datasets", "scikit-learn", "digits").load_digits()
    pixels = torch.from_numpy(data.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    images = from_pixels("digits", pixels, config.image_size, labels, list("0123456789"), levels=17)
    return image_dataset(dataclasses.replace(images, class_captions=DIGIT_NAMES), config.held_out)


def textures(config: DataConfig) -> tuple[ImageStack, Tensor, Tensor]:
    """Patches of two grayscale photographs of 512x512 pixels, grass (class 0) and gravel (class 1), and their split."""
    data = need("skimage.data", "scikit-image", "textures")
    plates = [torch.from_numpy(np.array(plate, np.uint8))[None] for plate in (data.grass(), data.gravel())]
    return _patches(config, plates, ["grass", "gravel"])


def texture_images(config: DataConfig) -> Dataset:
    """Grass and gravel as two classes."""
    return split_images(*textures(config))


def texture_domains(config: DataConfig) -> Dataset:
    """a: grass, b: gravel."""
    return split_domains(*textures(config))


def photo_images(config: DataConfig) -> Dataset:
    """Patches of two photographs of 427x640 pixels, a temple and a flower, without classes."""
    images, train, held = _patches(config, [plate[:3] for plate in _photos()], ["china", "flower"])
    return split_images(dataclasses.replace(images, labels=None, class_names=()), train, held)


def photo_pairs(config: DataConfig) -> Dataset:
    """The same patches: grayscale inputs (ITU-R 601 luma), targets in color."""
    images, train, held = _patches(config, _photos(), ["china", "flower"])
    assert isinstance(images.stack, Tensor)
    targets, inputs = (
        dataclasses.replace(images, stack=stack, contents=stack) for stack in images.stack.split((3, 1), dim=1)
    )
    return pair_dataset(inputs, targets, train, held)


def _photos() -> list[Tensor]:
    """(4, H, W) uint8 each: red, green, blue and gray."""
    folder = Path(need("sklearn.datasets", "scikit-learn", "photos").__file__).parent / "images"
    plates = []
    for file in (folder / "china.jpg", folder / "flower.jpg"):
        data = file.read_bytes()
        channels = (torch.from_numpy(decode(data, str(file), count, size=0)) for count in (3, 1))
        plates.append(torch.cat(list(channels)))
    return plates


def _patches(config: DataConfig, plates: list[Tensor], names: list[str]) -> tuple[ImageStack, Tensor, Tensor]:
    """(patches, indices of the training ones, indices of the held-out ones): always the same, equally many per plate.

    The held-out patches lie in a strip along the right edge, 1 / ``held_out`` of the plate, the others beside it.

    Args:
        plates: (C, H, W) uint8 each.

    Raises:
        ValueError: patches larger than the strip, or more patches than places.
    """
    name, size, every = config.source, config.image_size or PATCH, config.held_out or HELD_OUT
    total = config.items or PATCHES
    at_least(name, total, least=2 * every)
    strip = min(plate.shape[2] // every for plate in plates)
    if size > strip:
        raise ValueError(
            f"{name}: image_size: expected at most {strip}, the width of the held-out part (1/{every}), got {size}"
        )
    generator = torch.Generator().manual_seed(0)
    patches, labels, held = [], [], []
    for number, plate in enumerate(plates):
        own = total // len(plates) + (number < total % len(plates))
        cut = plate.shape[2] - strip
        for part, wanted in ((plate[:, :, :cut], own - own // every), (plate[:, :, cut:], own // every)):
            rows, columns = part.shape[1] - size + 1, part.shape[2] - size + 1
            if wanted > rows * columns:
                raise ValueError(
                    f"{name}: items: expected fewer ({rows * columns} places in {names[number]}), got {config.items}"
                )
            places = torch.randperm(rows * columns, generator=generator)[:wanted].tolist()
            patches += [part[:, at // columns :, at % columns :][:, :size, :size] for at in places]
        labels += [number] * own
        held += [False] * (own - own // every) + [True] * (own // every)
    stack, held_out = torch.stack(patches), torch.tensor(held)
    images = ImageStack(name, stack, stack, labels=torch.tensor(labels), class_names=names)
    return images, (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


Loader = Callable[[DataConfig], Dataset]
LOADERS: Mapping[str, tuple[Mapping[str, Loader], frozenset[str]]] = {
    "digits": ({"images": digits}, frozenset(("image_size",))),
    "textures": ({"domains": texture_domains, "images": texture_images}, frozenset(("image_size", "items"))),
    "photos": ({"images": photo_images, "pairs": photo_pairs}, frozenset(("image_size", "items"))),
    "prose": ({"text": lambda c: text_dataset("prose", prose(), c.held_out, c.tokens)}, frozenset(("tokens",))),
    "reversal": ({"sequences": lambda c: reversal(c.items, c.held_out)}, frozenset(("items",))),
    "sums": ({"sequences": lambda c: sums(c.items, c.held_out)}, frozenset(("items",))),
    "tones": ({"audio": lambda c: tones(c.items, c.held_out, c.seconds)}, frozenset(("items", "seconds"))),
}
"""The loader of each kind, and the options that the dataset uses."""
