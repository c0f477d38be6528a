"""Classes of pictures that a likelihood model is given: the option that asks for one, and checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen._checks import require_shape, require_tensor
from fastgen.models._base import Batch, option

MOST_COLUMNS = 32


@dataclass(frozen=True)
class LabelOptions:
    """Which class is drawn. ValueError names the field, what was expected and what came."""

    label: int = option(-1, "class that is drawn, 0, 1, ...; -1: all classes in turn")

    def __post_init__(self) -> None:
        if isinstance(self.label, bool) or not isinstance(self.label, int) or self.label < -1:
            raise ValueError(f"label: expected a class 0, 1, ... or -1 for all in turn, got {self.label!r}")


def check_labels(batch: Batch) -> Tensor:
    """The batch's labels. Raises TypeError, ValueError unless they are (B,) int64; the data keeps their range."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("labels: expected (B,) int64, got a batch without labels")
    require_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected an int64 tensor, got {labels.dtype}")
    require_shape("labels", labels, (len(batch["images"]),), "(B,)")
    return labels


def wanted_labels(n: int, label: int, classes: int) -> tuple[Tensor, int | None]:
    """(n,) int64, and how many make a row where each class has a column of its own.

    Raises:
        ValueError: there is no such class.
    """
    if label >= classes:
        raise ValueError(f"label: expected -1 or a class below {classes}, got {label}")
    if label >= 0:
        return torch.full((n,), label), None
    return torch.arange(n) % classes, classes if classes <= min(n, MOST_COLUMNS) else None
