"""Order of the training items: a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fastgen.batch import Batch
from fastgen.data import Items
from fastgen.train.signals import ignore_in_worker, signals_blocked

RESIDENT_BYTES = 2**31  # datasets up to this size are kept on the device
PREFETCHED = 4  # batches that each worker has ready
MIRRORED = ({"images"}, {"inputs", "targets"}, {"a"}, {"b"})  # names of images that are flipped together
ORDER, NOISE, FLIP, AUGMENT, DRAW = range(5)  # purposes of a seed


def seed_of(*where: int) -> int:
    """63 bits, a hash of ``where``: seed, purpose, epoch or step, ..."""
    return int.from_bytes(hashlib.blake2b(repr(where).encode(), digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the global generators of the CPU, the device, NumPy and Python.

    ``torch.manual_seed`` would seed every kind of device, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class Order:
    """An endless sequence of items: one permutation after another, each a function of (seed, epoch)."""

    def __init__(self, items: int, seed: int) -> None:
        self.items = items
        self.seed = seed
        self._epoch = -1
        self._permutation = torch.empty(0, dtype=torch.int64)

    def _permutation_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, ORDER, epoch))
            self._permutation = torch.randperm(self.items, generator=generator)
            self._epoch = epoch
        return self._permutation

    def slice(self, start: int, stop: int) -> Tensor:
        """The items at positions start .. stop - 1 of the sequence."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.items)
            taken = min(stop - start, self.items - place)
            parts.append(self._permutation_of(epoch)[place : place + taken])
            start += taken
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class Stream(Sampler[Tensor]):
    """The items of each part of each step, for one process of several.

    A step takes ``batches_per_step`` batches; a batch is cut into processes x accumulate parts, which the processes get
    in turn. Part k holds the same items for any number of processes.
    """

    def __init__(
        self,
        items: int,
        seed: int,
        batch_size: int,
        *,
        batches_per_step: int,
        accumulate: int,
        process: int,
        processes: int,
    ) -> None:
        self.order = Order(items, seed)
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.parts = [part * processes + process for part in range(accumulate)]
        self.part_size = batch_size // (accumulate * processes)
        self.first_step, self.last_step = 1, 0

    def part(self, step: int, index: int, part: int) -> Tensor:
        start = ((step - 1) * self.batches_per_step + index) * self.batch_size + part * self.part_size
        return self.order.slice(start, start + self.part_size)

    def __iter__(self) -> Iterator[Tensor]:
        """From ``first_step`` to ``last_step``: this process' parts of all batches of a step."""
        for indices, _ in self.seeded():
            yield indices

    def seeded(self) -> Iterator[tuple[Tensor, int]]:
        """The parts, each with the seed of items that are random."""
        for step in range(self.first_step, self.last_step + 1):
            for index in range(self.batches_per_step):
                for part in self.parts:
                    yield self.part(step, index, part), seed_of(self.order.seed, DRAW, step, index, part)


class _Seeded(Sampler[tuple[Tensor, int]]):
    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return self.stream.seeded()


class _ByIndices(Dataset[Batch]):
    """Items for a DataLoader whose workers load a whole part at a time."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __getitem__(self, key: tuple[Tensor, int]) -> Batch:
        return self.items.training_batch(*key)


def batches(items: Items, stream: Stream, device: torch.device, workers: int) -> Iterator[Batch]:
    """The parts of ``stream``, one after another; of items in memory on their device."""
    if items.lazy:
        pinned = device.type == "cuda"
        loader = DataLoader(
            _ByIndices(items),
            None,
            sampler=_Seeded(stream),
            num_workers=workers,
            pin_memory=pinned,
            prefetch_factor=PREFETCHED if workers else None,
            worker_init_fn=ignore_in_worker,
        )
        with signals_blocked():
            iterator = iter(loader)
        yield from iterator
        return
    for indices, seed in stream.seeded():
        yield items.training_batch(indices, seed)


def resident(items: Items, device: torch.device) -> Items:
    """The items on the device, where they are in memory and fit there."""
    size = sum(tensor.nbytes for tensor in getattr(items, "tensors", {}).values())
    return items if items.lazy or size > RESIDENT_BYTES else items.to(device)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def mirrored(batch: Batch, seed: int) -> Batch:
    """Each image flipped left to right with probability 1/2, the two of a pair together."""
    generator = torch.Generator().manual_seed(seed)
    out = dict(batch)
    for names in MIRRORED:
        flipped = torch.rand(len(next(iter(batch.values()))), generator=generator) < 0.5
        for name in batch.keys() & names:
            chosen = flipped.to(batch[name].device).view(-1, 1, 1, 1)
            out[name] = torch.where(chosen, batch[name].flip(-1), batch[name])
    return out
