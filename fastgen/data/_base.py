"""What a data set offers to training: two splits, facts, and a fingerprint."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Items(ABC):
    """A split: items by number. ``lazy``: fetching one takes work (decoding a file), worth doing ahead."""

    lazy = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """The items ``indices`` (B,) int64, on any device: tensors (B, ...), on the device of the data."""

    def to(self, device: torch.device | str) -> Items:
        """On the device, if that makes sense for these items; else as they are."""
        return self


class TensorItems(Items):
    """Items that lie in memory whole.

    Args:
        tensors: (N, ...) each, by name.
        scale: name -> s: integers that are divided by s when asked for, as float32.
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
    """A data set of one kind (``fastgen.models.KINDS`` says what its batches hold), split in two.

    name: as the user wrote it. facts: what a model's config may take from the data. fingerprint: of the contents and
    the split; equal only for equal data. make_splits: options of the model (the length of text) -> train, held out.
    about: what else ``describe`` tells a person.
    """

    name: str
    kind: str
    facts: Mapping[str, Any]
    fingerprint: str
    make_splits: Callable[..., tuple[Items, Items]] = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def splits(self, **options: Any) -> tuple[Items, Items]:
        """(training, held out). Options: ``length`` of text, in tokens."""
        return self.make_splits(**options)


def digest(*parts: Any) -> str:
    """A fingerprint of tensors, arrays' bytes and anything with a ``repr`` that says it all."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            total.update(f"{part.dtype}{tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().numpy().tobytes()
        total.update(part if isinstance(part, bytes) else repr(part).encode())
    return total.hexdigest()[:16]
