"""Data sets of kinds images, domains and pairs, from stacks of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Dataset, Items, TensorItems, digest
from fastgen.data.captions import caption_tokens, examples
from fastgen.data.pictures import Array, LazyItems, Stack, choose, fit_array, square
from fastgen.data.splitting import at_least, hold_out


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one size, before they become a data set of some kind.

    name: as the user wrote it. stack: (N, C, S, S) uint8. levels: values of a pixel, 0 to levels - 1 times
    ``step``. labels: (N,) int64. contents: what a fingerprint must know of them. captions: of each picture; without
    them, the names of its class are its caption, or ``class_captions`` where these say it better.
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

    def captioned(self, train: Tensor) -> tuple[Tensor | None, dict[str, Any]]:
        """Their captions (N, T) int64, padded with 0, if they have any; and the facts. train: whose are examples."""
        if self.captions:
            tokens, vocabulary = caption_tokens(self.captions)
            shown = examples([self.captions[i] for i in train.tolist()])
        elif self.labels is not None:
            names = [str(number) for number in range(int(self.labels.max()) + 1)]
            for captions in (self.class_names, self.class_captions):
                names[: len(captions)] = captions[: len(names)]
            tokens, vocabulary = caption_tokens(names)
            tokens, shown = tokens[self.labels], tuple(names)
        else:
            return None, {"caption_vocabulary": "", "caption_length": 0, "caption_examples": ()}
        facts = {"caption_vocabulary": vocabulary, "caption_length": tokens.shape[1], "caption_examples": shown}
        return tokens, facts


def from_pixels(
    name: str,
    pixels: Tensor,
    image_size: int,
    labels: Tensor | None = None,
    class_names: Sequence[str] = (),
    levels: int | None = None,
) -> Pictures:
    """Pictures that lie in memory.

    Args:
        pixels: (N, C, H, W) uint8, from 0 to 255, or to ``levels`` - 1. Only 0 and 1, or only 0 and 255, are 2 levels.
        image_size: resize to this; 0 leaves them.

    Raises:
        ValueError: too few, or not square and no ``image_size``.
    """
    at_least(name, len(pixels), "images")
    top = (levels or 256) - 1
    if image_size and tuple(pixels.shape[2:]) != (image_size, image_size):
        if levels is None and int(pixels.max()) == 1:
            top = 1
        pixels = (pixels.int() * 255 + top // 2).div(top, rounding_mode="floor").to(torch.uint8)
        pixels, levels = fit_array(pixels, image_size), None
    square(name, pixels.shape[2], pixels.shape[3])
    levels, step = (levels, 1) if levels else count_levels(pixels)
    return Pictures(name, pixels, pixels, levels, step, labels, class_names)


def count_levels(stack: Stack) -> tuple[int, int]:
    """(levels, step) of pixels: (2, 1) or (2, 255) where they are only black and white, else (256, 1)."""
    if isinstance(stack, Tensor):
        highest = int(stack.max())
        if highest in (1, 255) and bool(((stack == 0) | (stack == highest)).all()):
            return 2, highest
    return 256, 1


def check_labels(name: str, labels: Array, n: int) -> Tensor:
    """(n,) int64, 0 to classes - 1. TypeError, ValueError where the labels are something else."""
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


def image_dataset(pictures: Pictures, every: int) -> Dataset:
    """Kind images. One picture in ``every`` of each class is held out."""
    train, held = hold_out(len(pictures.stack), every, pictures.labels)
    return split_images(pictures, train, held)


def split_images(pictures: Pictures, train: Tensor, held: Tensor) -> Dataset:
    """Kind images, with a split made elsewhere: numbers of pictures."""
    labels, scale = pictures.labels, {"images": pictures.scale}
    classes = 0 if labels is None else int(labels.max()) + 1
    captions, of_captions = pictures.captioned(train)
    more = {name: of for name, of in (("labels", labels), ("caption", captions)) if of is not None}

    def make_splits() -> tuple[Items, Items]:
        return _items(_part(train), scale), _items(_part(held), scale)

    def _part(indices: Tensor) -> dict[str, Stack]:
        return {"images": choose(pictures.stack, indices), **{name: of[indices] for name, of in more.items()}}

    counts = [] if labels is None else labels.bincount().tolist()
    about = {"class_names": list(pictures.class_names), "class_counts": counts}
    facts = {**pictures.facts, "classes": classes}
    told = [list(pictures.captions)] if pictures.captions else []
    fingerprint = digest("images", facts, pictures.step, pictures.contents, labels, held, *told)
    return Dataset(pictures.name, "images", {**facts, **of_captions}, fingerprint, make_splits, about)


def domain_dataset(pictures: Pictures, every: int) -> Dataset:
    """Kind domains: class 0 is a, class 1 is b. One picture in ``every`` of each is held out."""
    assert pictures.labels is not None
    train, held = [], []
    for domain in (0, 1):
        members = (pictures.labels == domain).nonzero()[:, 0]
        at_least(pictures.name, len(members), f"images of domain {'ab'[domain]}")
        kept, out = hold_out(len(members), every)
        train.append(members[kept])
        held.append(members[out])
    return split_domains(pictures, torch.cat(train), torch.cat(held))


def split_domains(pictures: Pictures, train: Tensor, held: Tensor) -> Dataset:
    """Kind domains, with a split made elsewhere.

    Item i holds the pictures i of both domains, which have nothing to do with each other. In training the smaller
    domain comes round again until the larger one is through; of the held-out pictures the larger leaves some out.
    """
    labels, scale = pictures.labels, {"a": pictures.scale, "b": pictures.scale}
    assert labels is not None

    def make_splits() -> tuple[Items, Items]:
        (a, b), (held_a, held_b) = (
            [indices[labels[indices] == domain] for domain in (0, 1)] for indices in (train, held)
        )
        n, m = max(len(a), len(b)), min(len(held_a), len(held_b))
        return _pair(a[torch.arange(n) % len(a)], b[torch.arange(n) % len(b)]), _pair(held_a[:m], held_b[:m])

    def _pair(a: Tensor, b: Tensor) -> Items:
        return _items({"a": choose(pictures.stack, a), "b": choose(pictures.stack, b)}, scale)

    about = {"class_names": list(pictures.class_names), "class_counts": labels.bincount().tolist()}
    fingerprint = digest("domains", pictures.facts, pictures.step, pictures.contents, labels, held)
    return Dataset(pictures.name, "domains", pictures.facts, fingerprint, make_splits, about)


def pair_dataset(inputs: Pictures, targets: Pictures, train: Tensor, held: Tensor) -> Dataset:
    """Kind pairs: picture i of the inputs belongs to picture i of the targets."""
    scale = {"inputs": inputs.scale, "targets": targets.scale}
    facts = {**targets.facts, "input_channels": inputs.stack.shape[1]}

    def make_splits() -> tuple[Items, Items]:
        return _part(train), _part(held)

    def _part(indices: Tensor) -> Items:
        return _items({"inputs": choose(inputs.stack, indices), "targets": choose(targets.stack, indices)}, scale)

    fingerprint = digest("pairs", facts, inputs.scale, targets.step, inputs.contents, targets.contents, held)
    return Dataset(targets.name, "pairs", facts, fingerprint, make_splits)


def _items(stacks: dict[str, Stack], scale: dict[str, float]) -> Items:
    tensors = {name: stack for name, stack in stacks.items() if isinstance(stack, Tensor)}
    return TensorItems(tensors, scale) if len(tensors) == len(stacks) else LazyItems(stacks, scale)
