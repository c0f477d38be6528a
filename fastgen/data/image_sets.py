"""Datasets of kinds images, domains and pairs, from stacks of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.batch import caption_tokens
from fastgen.data._base import Dataset, Items, TensorItems, digest
from fastgen.data.captions import caption_examples
from fastgen.data.images import Array, LazyItems, Stack, choose, fit_array, require_square
from fastgen.data.splitting import at_least, hold_out


@dataclass(frozen=True, eq=False)
class ImageStack:
    """Images of one size with their labels and captions, before the kind of dataset is chosen.

    Attributes:
        name: the source as the user wrote it.
        stack: (N, C, S, S) uint8.
        contents: hashed by the fingerprint.
        levels: number of values of a pixel, which are 0 to levels - 1 times ``step``.
        labels: (N,) int64.
        captions: one for each image. Without them the names of the classes, ``class_captions`` if given, are captions.
    """

    name: str
    stack: Stack
    contents: Any
    levels: int = 256
    step: int = 1
    labels: Tensor | None = None
    class_names: Sequence[str] = ()
    captions: Sequence[str] = ()
    class_captions: Sequence[str] = ()

    @property
    def scale(self) -> float:
        return float((self.levels - 1) * self.step)

    @property
    def facts(self) -> dict[str, int]:
        return {"image_size": self.stack.shape[2], "channels": self.stack.shape[1], "levels": self.levels}

    @property
    def classes(self) -> dict[str, int]:
        """Name -> number of images."""
        counts = [] if self.labels is None else self.labels.bincount().tolist()
        return {self.class_names[i] if i < len(self.class_names) else str(i): n for i, n in enumerate(counts)}

    def captioned(self, train: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """(captions (N, T) int64 or None, facts). train: indices of the images whose captions are examples."""
        if self.captions:
            texts = list(self.captions)
            examples = caption_examples([texts[i] for i in train.tolist()])
        elif self.labels is not None:
            texts = [str(number) for number in range(int(self.labels.max()) + 1)]
            for names in (self.class_names, self.class_captions):
                texts[: len(names)] = names[: len(texts)]
            examples = tuple(texts)
        else:
            return None, {"caption_vocabulary": "", "caption_length": 0, "caption_examples": ()}
        vocabulary, length = "".join(sorted(set("".join(texts)))), max(map(len, texts), default=0)
        tokens = caption_tokens(texts, vocabulary, length)
        if not self.captions and self.labels is not None:
            tokens = tokens[self.labels]
        return tokens, {"caption_vocabulary": vocabulary, "caption_length": length, "caption_examples": examples}


def from_pixels(
    name: str,
    pixels: Tensor,
    image_size: int,
    labels: Tensor | None = None,
    class_names: Sequence[str] = (),
    levels: int | None = None,
) -> ImageStack:
    """Images in memory.

    Args:
        pixels: (N, C, H, W) uint8, from 0 to 255, or to ``levels`` - 1. Only 0 and 1, or only 0 and 255, are 2 levels.
        image_size: the size to resize to; 0 leaves them as they are.

    Raises:
        ValueError: too few images, or not square and no ``image_size``.
    """
    at_least(name, len(pixels), "images")
    top = (levels or 256) - 1
    if image_size and tuple(pixels.shape[2:]) != (image_size, image_size):
        if levels is None and int(pixels.max()) == 1:
            top = 1
        pixels = (pixels.int() * 255 + top // 2).div(top, rounding_mode="floor").to(torch.uint8)
        pixels, levels = fit_array(pixels, image_size), None
    require_square(name, pixels.shape[2], pixels.shape[3])
    levels, step = (levels, 1) if levels else count_levels(pixels)
    return ImageStack(name, pixels, pixels, levels, step, labels, class_names)


def count_levels(stack: Stack) -> tuple[int, int]:
    """(levels, step) of pixels: (2, 1) or (2, 255) where they are only black and white, else (256, 1)."""
    if isinstance(stack, Tensor):
        highest = int(stack.max())
        if highest in (1, 255) and bool(((stack == 0) | (stack == highest)).all()):
            return 2, highest
    return 256, 1


def check_labels(name: str, labels: Array, n: int) -> Tensor:
    """(n,) int64, 0 to classes - 1. Raises TypeError, ValueError for other labels."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}: labels: expected integers, got {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"{name}: labels: expected shape ({n},), got {labels.shape}")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= n:
        raise ValueError(
            f"{name}: labels: expected numbers from 0 to classes - 1, at most as many classes as images ({n}), "
            f"got {lowest} to {highest}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def image_dataset(images: ImageStack, every: int) -> Dataset:
    """Kind images. One image in ``every`` of each class is held out."""
    return split_images(images, *hold_out(len(images.stack), every, images.labels))


def split_images(images: ImageStack, train: Tensor, held: Tensor) -> Dataset:
    """Kind images. train, held: indices of the images of each split."""
    labels = images.labels
    captions, caption_facts = images.captioned(train)
    stacks: dict[str, Stack] = {"images": images.stack}
    stacks |= {name: part for name, part in (("labels", labels), ("caption", captions)) if part is not None}
    facts = {**images.facts, "classes": 0 if labels is None else int(labels.max()) + 1}
    texts = [list(images.captions)] if images.captions else []
    fingerprint = digest("images", facts, images.step, images.contents, labels, held, *texts)
    train_items, held_out = (_items(stacks, {"images": images.scale}, indices) for indices in (train, held))
    return Dataset(
        images.name, "images", {**facts, **caption_facts}, fingerprint, train_items, held_out, images.classes
    )


def domain_dataset(images: ImageStack, every: int) -> Dataset:
    """Kind domains: class 0 is a, class 1 is b. One image in ``every`` of each is held out."""
    assert images.labels is not None
    train, held = [], []
    for domain in (0, 1):
        members = (images.labels == domain).nonzero()[:, 0]
        at_least(images.name, len(members), f"images of domain {'ab'[domain]}")
        kept, out = hold_out(len(members), every)
        train.append(members[kept])
        held.append(members[out])
    return split_domains(images, torch.cat(train), torch.cat(held))


def split_domains(images: ImageStack, train: Tensor, held: Tensor) -> Dataset:
    """Kind domains. train, held: indices of the images of each split.

    Item i holds image i of each domain; the two are unrelated. In training the smaller domain repeats until the larger
    one is exhausted; of the held-out images the larger domain leaves some out.
    """
    labels, scale = images.labels, {"a": images.scale, "b": images.scale}
    assert labels is not None

    def items(a: Tensor, b: Tensor) -> Items:
        return _from_stacks({"a": choose(images.stack, a), "b": choose(images.stack, b)}, scale)

    (a, b), (held_a, held_b) = ([part[labels[part] == domain] for domain in (0, 1)] for part in (train, held))
    n, m = max(len(a), len(b)), min(len(held_a), len(held_b))
    splits = (items(a[torch.arange(n) % len(a)], b[torch.arange(n) % len(b)]), items(held_a[:m], held_b[:m]))
    fingerprint = digest("domains", images.facts, images.step, images.contents, labels, held)
    return Dataset(images.name, "domains", images.facts, fingerprint, *splits, images.classes)


def pair_dataset(inputs: ImageStack, targets: ImageStack, train: Tensor, held: Tensor) -> Dataset:
    """Kind pairs: image i of the inputs belongs to image i of the targets."""
    stacks, scale = (
        {"inputs": inputs.stack, "targets": targets.stack},
        {"inputs": inputs.scale, "targets": targets.scale},
    )
    facts = {**targets.facts, "input_channels": inputs.stack.shape[1]}
    fingerprint = digest("pairs", facts, inputs.scale, targets.step, inputs.contents, targets.contents, held)
    train_items, held_out = (_items(stacks, scale, indices) for indices in (train, held))
    return Dataset(targets.name, "pairs", facts, fingerprint, train_items, held_out)


def _items(stacks: Mapping[str, Stack], scale: dict[str, float], indices: Tensor) -> Items:
    return _from_stacks({name: choose(stack, indices) for name, stack in stacks.items()}, scale)


def _from_stacks(stacks: dict[str, Stack], scale: dict[str, float]) -> Items:
    tensors = {name: stack for name, stack in stacks.items() if isinstance(stack, Tensor)}
    return TensorItems(tensors, scale) if len(tensors) == len(stacks) else LazyItems(stacks, scale)
