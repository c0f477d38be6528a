"""The held-out split: the same items on every call and every machine."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_ITEMS = 10
HELD_OUT = 5
HELD_OUT_TEXT = 10


def hold_out(n: int, every: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(training, held out): indices of items, ascending. One in ``every`` is held out, chosen at random.

    Args:
        n: number of items.
        every: 0 stands for ``HELD_OUT``.
        labels: (n,) int64; the split is stratified by them.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    if labels is not None:
        order = order[labels[order].argsort(stable=True)]
    held = torch.zeros(n, dtype=torch.bool)
    held[order[:: every or HELD_OUT]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def hold_out_groups(groups: Tensor, every: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``hold_out``; items of one group (groups: (n,) int64, 0, 1, ...) stay in one split. labels: of each group."""
    _, held_groups = hold_out(int(groups.max()) + 1, every, labels)
    held = torch.isin(groups, held_groups)
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def at_least(name: str, n: int, what: str = "items", least: int = MIN_ITEMS) -> None:
    """Raises ValueError where there are too few items for two splits."""
    if n < least:
        raise ValueError(f"{name}: {what}: expected at least {least} of them, got {n}")
