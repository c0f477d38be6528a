"""Bundled pictures: digits, patches of textures and of photographs. Nothing is downloaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Dataset
from fastgen.data._optional import need
from fastgen.data.image_sets import (
    Pictures,
    from_pixels,
    image_dataset,
    pair_dataset,
    split_domains,
    split_images,
)
from fastgen.data.pictures import decode
from fastgen.data.splitting import HELD_OUT, at_least

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PATCH = 32
PATCHES = 4000


def digits(image_size: int, every: int) -> Dataset:
    """1797 handwritten digits of 8x8 pixels with 17 levels, in 10 classes.

    A pixel counts the ink in a 4x4 block of the scan: Alpaydin and Kaynak, "Optical recognition of handwritten
    digits", 1998.
    """
    data = need("sklearn.datasets", "scikit-learn", "digits").load_digits()
    pixels = torch.from_numpy(data.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(data.target.astype(np.int64))
    pictures = from_pixels("digits", pixels, image_size, labels, list("0123456789"), levels=17)
    return image_dataset(dataclasses.replace(pictures, class_captions=WORDS), every)


def textures(image_size: int, items: int, every: int) -> tuple[Pictures, Tensor, Tensor]:
    """Patches of two grey photographs of 512x512 pixels, grass (class 0) and gravel (class 1), and their split."""
    data = need("skimage.data", "scikit-image", "textures")
    plates = [torch.from_numpy(np.array(plate, np.uint8))[None] for plate in (data.grass(), data.gravel())]
    return _patches("textures", plates, ["grass", "gravel"], image_size, items, every)


def texture_images(image_size: int, items: int, every: int) -> Dataset:
    """Grass and gravel as two classes."""
    return split_images(*textures(image_size, items, every))


def texture_domains(image_size: int, items: int, every: int) -> Dataset:
    """a: grass, b: gravel."""
    return split_domains(*textures(image_size, items, every))


def photo_images(image_size: int, items: int, every: int) -> Dataset:
    """Patches of two photographs of 427x640 pixels, a temple and a flower, without classes."""
    pictures, train, held = _photos(image_size, items, every, channels=3)
    return split_images(dataclasses.replace(pictures, labels=None, class_names=()), train, held)


def photo_pairs(image_size: int, items: int, every: int) -> Dataset:
    """The same patches: grey inputs (ITU-R 601 luma), targets in colour."""
    targets, train, held = _photos(image_size, items, every, channels=3)
    return pair_dataset(_photos(image_size, items, every, channels=1)[0], targets, train, held)


def _photos(image_size: int, items: int, every: int, channels: int) -> tuple[Pictures, Tensor, Tensor]:
    folder = Path(need("sklearn.datasets", "scikit-learn", "photos").__file__).parent / "images"
    files = [folder / name for name in ("china.jpg", "flower.jpg")]
    plates = [torch.from_numpy(decode(file.read_bytes(), str(file), channels, size=0)) for file in files]
    return _patches("photos", plates, ["china", "flower"], image_size, items, every)


def _patches(
    name: str, plates: list[Tensor], names: list[str], image_size: int, items: int, every: int
) -> tuple[Pictures, Tensor, Tensor]:
    """(patches, numbers of those to train on, of those held out): the same ones always, of every plate as many.

    The held-out patches lie in a strip along the right edge, 1 / ``every`` of the plate, the others beside it.

    Args:
        plates: (C, H, W) uint8 each.

    Raises:
        ValueError: patches larger than the strip, or more than there are places.
    """
    size, total, every = image_size or PATCH, items or PATCHES, every or HELD_OUT
    at_least(name, total, least=2 * every)
    strip = min(plate.shape[2] // every for plate in plates)
    if size > strip:
        raise ValueError(
            f"{name}: image_size: expected at most {strip}, the width of the held-out part (1/{every}), got {size}"
        )
    generator = torch.Generator().manual_seed(0)
    patches, labels, held = [], [], []
    for number, plate in enumerate(plates):
        mine = total // len(plates) + (number < total % len(plates))
        cut = plate.shape[2] - strip
        for part, wanted in ((plate[:, :, :cut], mine - mine // every), (plate[:, :, cut:], mine // every)):
            rows, columns = part.shape[1] - size + 1, part.shape[2] - size + 1
            if wanted > rows * columns:
                raise ValueError(
                    f"{name}: items: expected fewer ({rows * columns} places in {names[number]}), got {items}"
                )
            places = torch.randperm(rows * columns, generator=generator)[:wanted].tolist()
            patches += [part[:, at // columns :, at % columns :][:, :size, :size] for at in places]
        labels += [number] * mine
        held += [False] * (mine - mine // every) + [True] * (mine // every)
    stack, held_out = torch.stack(patches), torch.tensor(held)
    pictures = Pictures(name, stack, stack, labels=torch.tensor(labels), class_names=names)
    return pictures, (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]
