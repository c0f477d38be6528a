"""Scores of held-out items, computed by several processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fastgen.batch import Batch
from fastgen.data import Items
from fastgen.train.stream import NOISE, seed_of, to_device

MOST = 10_000  # items of a split that distances take
VISUALIZED = 64  # held-out items that ``visualize`` receives
Scores = dict[str, Tensor]


class Thinned(Items):
    """At most ``count`` of the items, evenly spaced."""

    def __init__(self, items: Items, count: int) -> None:
        self.items = items
        self.lazy = items.lazy
        self.chosen = torch.linspace(0, len(items) - 1, min(count, len(items))).round().long()

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Tensor) -> Batch:
        return self.items.batch(self.chosen[indices.cpu()])


def all_items(items: Items, batch_size: int) -> dict[str, Tensor]:
    """All items on the CPU; of large sets ``MOST``, evenly spaced."""
    items = Thinned(items, MOST)

    def blocks() -> Iterator[dict[str, Tensor]]:
        for indices in torch.arange(len(items)).split(batch_size):
            yield {name: tensor.cpu() for name, tensor in items.batch(indices).items()}

    found = list(blocks())
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def first(items: Items, count: int, device: torch.device) -> Batch:
    return to_device(items.batch(torch.arange(min(count, len(items)))), device)


def scores(
    module: Callable[..., Any],
    items: Items,
    batch_size: int,
    accelerator: Accelerator,
    method: str = "score",
    seed: int = 0,
) -> Scores:
    """Scores (N,) of every item, in order, on the CPU, by the model's ``method``; the same on every process.

    The noise of a batch depends on (seed, index of the batch), not on the number of processes.
    """
    starts = range(0, len(items), batch_size)
    rounds = -(-len(starts) // accelerator.num_processes)
    found: list[tuple[int, Scores]] = []
    for turn in range(rounds):
        # FSDP needs the same number of calls in all processes: one without a batch left repeats the last.
        number = min(turn * accelerator.num_processes + accelerator.process_index, len(starts) - 1)
        start = starts[number]
        batch = to_device(items.batch(torch.arange(start, min(start + batch_size, len(items)))), accelerator.device)
        generator = torch.Generator(accelerator.device).manual_seed(seed_of(seed, NOISE, number))
        out = module(method, batch, generator=generator)
        out = out if isinstance(out, dict) else {method: out}
        found.append((number, {name: value.detach().float().cpu() for name, value in out.items()}))
    if accelerator.num_processes > 1:
        found = gather_object(found)
    in_order = [values for _, values in sorted(dict(found).items())]
    return {name: torch.cat([values[name] for values in in_order]) for name in in_order[0]} if in_order else {}


def mean_scores(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over items; sums over tokens become nats per token, and per character where characters are counted."""
    means = {name: float(value.double().mean()) for name, value in values.items()}
    if "tokens" in means:
        counts = {unit: means.pop(unit + "s") for unit in ("token", "character") if unit + "s" in means}
        nll = means.pop("nll")
        means = {**{f"nats per {unit}": nll / count for unit, count in counts.items()}, **means}
    return means
