"""Checks that a model can train on its data, once, before training begins."""

from __future__ import annotations

import torch

from fastgen.data import Items
from fastgen.models import GenerativeModel
from fastgen.train.errors import UsageError
from fastgen.train.evaluation import Thinned
from fastgen.train.stream import to_device

INSPECTED, INSPECTED_LAZY = 2**14, 64
"""Items of each split that are checked, evenly spaced; fewer of lazy ones."""
BLOCK = 1024


def inspect(model: GenerativeModel, splits: tuple[Items, Items]) -> None:
    """Raises UsageError for items that the model's ``check`` rejects: values out of range, shapes, labels, tokens."""
    for part, items in zip(("training", "held-out"), splits, strict=True):
        chosen = Thinned(items, INSPECTED_LAZY if items.lazy else INSPECTED)
        for indices in torch.arange(len(chosen)).split(BLOCK):
            try:
                model.check(to_device(chosen.batch(indices), torch.device("cpu")))
            except (TypeError, ValueError) as error:
                raise UsageError(f"data: {part} items: {error}") from error
