"""Datasets: two splits of items, facts, and a fingerprint; and the sources that they are loaded from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen.batch import FACTS


class Items(ABC):
    """A split: items by index. ``lazy``: reading an item is expensive (a file is decoded) and worth prefetching."""

    lazy = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The items ``indices`` (B,) int64, on any device: tensors (B, ...), on the device of the data."""

    def training_batch(self, indices: Tensor, seed: int) -> dict[str, Tensor]:
        """As ``batch``, for a training step; items that are random are drawn with ``seed``."""
        return self.batch(indices)

    def to(self, device: torch.device | str) -> Items:
        """The items on a device; lazy ones stay where they are."""
        return self


class TensorItems(Items):
    """Items in memory.

    Args:
        tensors: (N, ...) each, by name.
        scale: name -> s: integers that a batch holds as float32, divided by s.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scale: Mapping[str, float] | None = None) -> None:
        self.tensors = dict(tensors)
        self.scale = dict(scale or {})
        lengths = {len(tensor) for tensor in self.tensors.values()}
        if len(lengths) != 1:
            raise ValueError(f"tensors: expected one length, got {sorted(lengths)}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        out = {}
        for name, tensor in self.tensors.items():
            chosen = tensor[indices.to(tensor.device)]
            out[name] = chosen.float() / self.scale[name] if name in self.scale else chosen
        return out

    def to(self, device: torch.device | str) -> TensorItems:
        return TensorItems({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.scale)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset of one kind (``fastgen.batch.KINDS`` lists the tensors of its batches), split in two.

    Attributes:
        name: the source as the user wrote it.
        facts: what a model's config may take from the data, by the names in ``fastgen.batch.FACTS``.
        fingerprint: hash of the contents and the split; equal only for equal data.
        train, held_out: the splits.
        classes: name -> number of items, both splits.
        warnings: notes for ``describe``.
    """

    name: str
    kind: str
    facts: Mapping[str, Any]
    fingerprint: str
    train: Items = field(repr=False)
    held_out: Items = field(repr=False)
    classes: Mapping[str, int] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if set(self.facts) != set(FACTS[self.kind]):
            raise ValueError(f"facts: expected {', '.join(FACTS[self.kind])}, got {', '.join(self.facts)}")

    def splits(self, length: int | None = None) -> tuple[Items, Items]:
        """(training, held-out) items. length: tokens of a window of text; None for all other kinds."""
        if length is not None:
            raise ValueError(f"length: expected None, as {self.name} is no text, got {length}")
        return self.train, self.held_out


class Source(ABC):
    """Data before a kind is chosen: a bundled set, a file, a folder, a table.

    Attributes:
        kinds: the kinds that it can serve, the default first.
        options: names of the ``DataConfig`` fields that it uses, beside ``source`` and ``held_out``.
    """

    kinds: tuple[str, ...]
    options: frozenset[str] = frozenset()

    @abstractmethod
    def load(self, kind: str) -> Dataset:
        """The dataset as one of ``kinds``."""

    def obstacle(self, kind: str) -> str:
        """What keeps data that nearly are of a kind from being so, as a message; "" where they are far from it."""
        return ""


def digest(*parts: Any) -> str:
    """A fingerprint of tensors, bytes and objects whose ``repr`` is complete."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().numpy().tobytes()
        total.update(part if isinstance(part, bytes) else repr(part).encode())
    return total.hexdigest()[:16]
