"""Datasets of kinds images, domains and pairs, from stacks of images."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgen.batch import caption_tokens
from fastgen.data._base import Dataset, Items, Source, TensorItems, digest
from fastgen.data._files import few
from fastgen.data.binarized import binarize
from fastgen.data.captions import caption_examples
from fastgen.data.config import DataConfig
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
        notes: for ``describe``.
        label_values: the number that each class has in the file, where classes are the numbers that occur there.
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
    notes: tuple[str, ...] = ()
    label_values: tuple[int, ...] = ()

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
        ValueError: not square and no ``image_size``.
    """
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
    """(n,) int64, 0 or more. Raises TypeError, ValueError for other labels."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}: labels: expected integers, got {labels.dtype}")
    if labels.shape != (n,):
        raise ValueError(f"{name}: labels: expected shape ({n},), got {labels.shape}")
    if n and (int(labels.min()) < 0 or int(labels.max()) > np.iinfo(np.int64).max):
        raise _bad_labels(name, n, int(labels.min()), int(labels.max()))
    return torch.from_numpy(labels.astype(np.int64))


def _bad_labels(name: str, n: int, lowest: int, highest: int) -> ValueError:
    return ValueError(
        f"{name}: labels: expected numbers from 0 to classes - 1, at most as many classes as images ({n}), "
        f"got {lowest} to {highest}"
    )


class PairStacks(NamedTuple):
    """Image i of the inputs belongs to image i of the targets."""

    inputs: ImageStack
    targets: ImageStack


class ImageSource(Source):
    """Images with, perhaps, a held-out split of their own.

    Attributes:
        test: the source of the held-out split; None: part of this source's items.
        notes: for ``describe``.
        used: files of a folder that belong to the data.
    """

    config: DataConfig
    test: ImageSource | None = None
    notes: tuple[str, ...] = ()
    used: Set[Path] = frozenset()

    @abstractmethod
    def read(self, like: ImageStack | None = None) -> ImageStack:
        """The images. like: the training images, whose classes and channels those of a held-out split have.

        Raises:
            ValueError: images that do not fit, or none like ``like``; files that can't be read.
        """

    def read_pairs(self, like: PairStacks | None = None) -> PairStacks:
        raise ValueError(f"{self.config.source}: expected pairs of images, got images")

    def load(self, kind: str) -> Dataset:
        config = self.config
        if self.test is not None and config.held_out:
            raise ValueError(
                f"{config.source}: held_out: expected 0, as the data have a held-out split of their own, "
                f"got {config.held_out}"
            )
        if kind == "pairs":
            data = self._pairs()
        else:
            images = self.read()
            n = len(images.stack)
            at_least(config.source, n, "images")
            if images.labels is not None and int(images.labels.max()) >= n:
                raise _bad_labels(config.source, n, int(images.labels.min()), int(images.labels.max()))
            test = _like(images, self.test.read(images), self.test) if self.test else None
            if kind == "domains":
                data = domain_dataset(images, config.held_out, test)
            else:
                data = image_dataset(images, config.held_out, test)
            empty = [name for name, count in data.classes.items() if not count]
            absent = (f"classes without an item: {few(empty)}",) if empty else ()
            notes = (*images.notes, *(test.notes if test else ()), *absent)
            data = dataclasses.replace(data, warnings=tuple(dict.fromkeys((*data.warnings, *notes))))
        return data if config.binarize == "none" else binarize(data, dynamic=config.binarize == "dynamic")

    def _pairs(self) -> Dataset:
        pairs = self.read_pairs()
        notes = [*pairs.inputs.notes, *pairs.targets.notes]
        if self.test is None:
            splits = hold_out(len(pairs.inputs.stack), self.config.held_out)
            data = pair_dataset(*self._directed(pairs), *splits)
        else:
            held = self.test.read_pairs(pairs)
            held = PairStacks(*(_like(a, b, self.test) for a, b in zip(pairs, held, strict=True)))
            notes += [*held.inputs.notes, *held.targets.notes]
            data = _pairs_of(self._directed(pairs), self._directed(held))
        return dataclasses.replace(data, warnings=tuple(dict.fromkeys(notes)))

    def _directed(self, pairs: PairStacks) -> PairStacks:
        return PairStacks(*pairs[::-1]) if self.config.direction == "BtoA" else pairs


def _like(images: ImageStack, test: ImageStack, source: ImageSource) -> ImageStack:
    """Held-out images checked against the training images: as many channels, levels and, with labels, classes."""
    place = getattr(source, "name", source.config.source)
    if images.stack.shape[2] != test.stack.shape[2]:
        raise ValueError(
            f"{place}: expected images of {images.stack.shape[2]}x{images.stack.shape[2]}, as for training, got "
            f"{test.stack.shape[2]}x{test.stack.shape[2]}: --image-size resizes and crops them"
        )
    if isinstance(test.stack, Tensor) and (images.stack.shape[1], test.stack.shape[1]) == (3, 1):
        test = dataclasses.replace(test, stack=test.stack.expand(-1, 3, -1, -1).contiguous())
    if images.stack.shape[1] != test.stack.shape[1]:
        raise ValueError(
            f"{place}: expected images of {images.stack.shape[1]} channels, as for training, got {test.stack.shape[1]}"
        )
    if bool(images.captions) != bool(test.captions):
        expected, got = ("captions", "none") if images.captions else ("no captions", "some")
        raise ValueError(f"{place}: expected {expected}, as for training, got {got}")
    if images.labels is None:
        return dataclasses.replace(test, labels=None, class_names=())
    if test.labels is None:
        raise ValueError(f"{place}: expected labels, as for training, got none")
    classes = int(images.labels.max()) + 1
    if int(test.labels.max()) >= classes:
        raise ValueError(f"{place}: labels: expected 0 to {classes - 1}, as for training, got {int(test.labels.max())}")
    return test


def image_dataset(images: ImageStack, every: int, test: ImageStack | None = None) -> Dataset:
    """Kind images. One image in ``every`` of each class is held out, or all images of ``test``, if there are any."""
    if test is None:
        return split_images(images, *hold_out(len(images.stack), every, images.labels))
    images, test = _same_levels(images, test)
    n, m = len(images.stack), len(test.stack)
    both = images
    if images.labels is not None and test.labels is not None:
        both = dataclasses.replace(both, labels=torch.cat([images.labels, test.labels]))
    both = dataclasses.replace(both, captions=[*images.captions, *test.captions])
    captions, caption_facts = both.captioned(torch.arange(n))
    facts = {**images.facts, "classes": 0 if both.labels is None else int(both.labels.max()) + 1}
    splits = []
    for stack, part in ((images.stack, slice(n)), (test.stack, slice(n, n + m))):
        stacks: dict[str, Stack] = {"images": stack}
        columns = (("labels", both.labels), ("caption", captions))
        stacks |= {name: column[part] for name, column in columns if column is not None}
        splits.append(_from_stacks(stacks, {"images": images.scale}))
    train, held_out = splits
    texts = [list(both.captions)] if both.captions else []
    fingerprint = digest("images", facts, images.step, images.contents, test.contents, both.labels, *texts)
    return Dataset(images.name, "images", {**facts, **caption_facts}, fingerprint, train, held_out, both.classes)


def _same_levels(images: ImageStack, test: ImageStack) -> tuple[ImageStack, ImageStack]:
    """Both with the scale of one stack: 256 levels, unless both have the same two."""
    if (images.levels, images.step) == (test.levels, test.step):
        return images, test
    if 1 in (images.scale, test.scale) and images.scale != test.scale:
        raise ValueError(
            f"{test.name}: expected pixels from 0 to {images.scale:g} in both splits, got 0 to {test.scale:g} in one"
        )
    return dataclasses.replace(images, levels=256, step=1), dataclasses.replace(test, levels=256, step=1)


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


def domain_dataset(images: ImageStack, every: int, test: ImageStack | None = None) -> Dataset:
    """Kind domains: class 0 is a, class 1 is b. One image in ``every`` of each is held out, or those of ``test``."""
    assert images.labels is not None
    train, held = [], []
    for domain in (0, 1):
        members = (images.labels == domain).nonzero()[:, 0]
        at_least(images.name, len(members), f"images of domain {'ab'[domain]}")
        kept, out = hold_out(len(members), every)
        train.append(members[kept])
        held.append(members[out])
    if test is None:
        return split_domains(images, torch.cat(train), torch.cat(held))
    images, test = _same_levels(images, test)
    assert images.labels is not None
    assert test.labels is not None
    a, b = ((images.labels == domain).nonzero()[:, 0] for domain in (0, 1))
    held_a, held_b = ((test.labels == domain).nonzero()[:, 0] for domain in (0, 1))
    n, m = max(len(a), len(b)), min(len(held_a), len(held_b))
    if not m:
        raise ValueError(f"{test.name}: expected held-out images of both domains, got none of one")
    splits = (
        _domains(images, a[torch.arange(n) % len(a)], b[torch.arange(n) % len(b)]),
        _domains(test, held_a[:m], held_b[:m]),
    )
    fingerprint = digest(
        "domains", images.facts, images.step, images.contents, images.labels, test.contents, test.labels
    )
    counts = {name: number + test.classes.get(name, 0) for name, number in images.classes.items()}
    return Dataset(images.name, "domains", images.facts, fingerprint, *splits, counts)


def _domains(images: ImageStack, a: Tensor, b: Tensor) -> Items:
    scale = {"a": images.scale, "b": images.scale}
    return _from_stacks({"a": choose(images.stack, a), "b": choose(images.stack, b)}, scale)


def split_domains(images: ImageStack, train: Tensor, held: Tensor) -> Dataset:
    """Kind domains. train, held: indices of the images of each split.

    Item i holds image i of each domain; the two are unrelated. In training the smaller domain repeats until the larger
    one is exhausted; of the held-out images the larger domain leaves some out.
    """
    labels = images.labels
    assert labels is not None
    (a, b), (held_a, held_b) = ([part[labels[part] == domain] for domain in (0, 1)] for part in (train, held))
    n, m = max(len(a), len(b)), min(len(held_a), len(held_b))
    splits = (
        _domains(images, a[torch.arange(n) % len(a)], b[torch.arange(n) % len(b)]),
        _domains(images, held_a[:m], held_b[:m]),
    )
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


def _pairs_of(pairs: PairStacks, held: PairStacks) -> Dataset:
    """Kind pairs, with a held-out split of their own."""
    pairs, held = (
        PairStacks(*side) for side in zip(*(_same_levels(a, b) for a, b in zip(pairs, held, strict=True)), strict=True)
    )
    inputs, targets = pairs
    facts = {**targets.facts, "input_channels": inputs.stack.shape[1]}
    scale = {"inputs": inputs.scale, "targets": targets.scale}
    parts = [side.contents for both in (pairs, held) for side in both]
    train, held_out = (_from_stacks({"inputs": a.stack, "targets": b.stack}, scale) for a, b in (pairs, held))
    fingerprint = digest("pairs", facts, inputs.scale, targets.step, *parts)
    return Dataset(targets.name, "pairs", facts, fingerprint, train, held_out)


def _items(stacks: Mapping[str, Stack], scale: dict[str, float], indices: Tensor) -> Items:
    return _from_stacks({name: choose(stack, indices) for name, stack in stacks.items()}, scale)


def _from_stacks(stacks: dict[str, Stack], scale: dict[str, float]) -> Items:
    tensors = {name: stack for name, stack in stacks.items() if isinstance(stack, Tensor)}
    return TensorItems(tensors, scale) if len(tensors) == len(stacks) else LazyItems(stacks, scale)
