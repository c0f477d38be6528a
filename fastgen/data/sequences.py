"""Pairs of sequences: reversal, sums, and a user's pairs of lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastgen.batch import END, FIRST, PADDING, START
from fastgen.data._base import Dataset, Source, TensorItems, digest
from fastgen.data.config import DataConfig
from fastgen.data.splitting import at_least, hold_out_groups
from fastgen.data.text import encode, read_text

ITEMS, SUMS = 10_000, 50_000
MOST = 200_000
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Pairs = list[tuple[str, str]]


def sequence_dataset(name: str, pairs: Pairs, every: int, groups: Tensor | None = None) -> Dataset:
    """Kind sequences: (source, target). One source in ``every`` is held out, with all its targets.

    Args:
        groups: (N,) int64. Pairs of one group are held out together; default those of one source.
    """
    at_least(name, len(pairs), "pairs")
    if groups is None:
        number = {source: i for i, source in enumerate(dict.fromkeys(source for source, _ in pairs))}
        groups = torch.tensor([number[source] for source, _ in pairs])
        at_least(name, len(number), "different sources")
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    tokens, vocabulary = encode("".join(sources + targets))
    cut = sum(map(len, sources))
    tensors = {"source": _pad(tokens[:cut], sources), "target": _pad(tokens[cut:], targets)}
    facts = {"vocabulary": vocabulary, **{f"{side}_length": tensor.shape[1] for side, tensor in tensors.items()}}
    train, held = hold_out_groups(groups, every)

    train_items, held_out = (
        TensorItems({side: tensor[part] for side, tensor in tensors.items()}) for part in (train, held)
    )
    fingerprint = digest("sequences", facts, *tensors.values(), held)
    return Dataset(name, "sequences", facts, fingerprint, train_items, held_out)


def _pad(tokens: Tensor, texts: list[str]) -> Tensor:
    """(N, longest + 2) int64: each text's tokens between start and end, then padding."""
    lengths = torch.tensor([len(text) for text in texts])
    out = torch.full((len(texts), int(lengths.max()) + 2), PADDING)
    out[:, 0] = START
    columns = torch.arange(out.shape[1])
    out[(columns >= 1) & (columns <= lengths[:, None])] = tokens.long() + FIRST
    out[torch.arange(len(texts)), lengths + 1] = END
    return out


def reversal(items: int, every: int) -> Dataset:
    """Random strings of 4 to 12 letters, and their reversals. No string occurs twice."""
    sample = _sampler("reversal", items)
    texts: dict[str, None] = {}
    while len(texts) < (items or ITEMS):
        length = int(sample(4, 13, 1))
        texts["".join(LETTERS[i] for i in sample(0, 26, length).tolist())] = None
    return sequence_dataset("reversal", [(text, text[::-1]) for text in texts], every)


def sums(items: int, every: int) -> Dataset:
    """Two numbers from 0 to 999 and their sum: "12+345" -> "357". No two pairs have the same numbers, in any order.

    One, two and three digits are equally likely; most of the few short numbers occur.
    """
    sample = _sampler("sums", items)
    wanted = items or SUMS
    terms: dict[tuple[int, int], tuple[int, int]] = {}
    while len(terms) < wanted:
        digits = sample(1, 4, 2 * wanted)
        low = torch.where(digits == 1, 0, 10 ** (digits - 1))
        numbers = low + sample(0, 9000, 2 * wanted) % (10**digits - low)
        for a, b in numbers.view(-1, 2).tolist():
            terms.setdefault((min(a, b), max(a, b)), (a, b))
    pairs = [(f"{a}+{b}", str(a + b)) for a, b in list(terms.values())[:wanted]]
    return sequence_dataset("sums", pairs, every)


def _sampler(name: str, items: int) -> Callable[[int, int, int], Tensor]:
    """sample(low, high, n): n random integers, low <= i < high."""
    if items:
        at_least(name, items)
    if items > MOST:
        raise ValueError(f"{name}: items: expected at most {MOST}, got {items}")
    generator = torch.Generator().manual_seed(0)
    return lambda low, high, n: torch.randint(low, high, (n,), generator=generator)


class PairsFile(Source):
    """A UTF-8 file of lines: source, a tab, target. Empty lines are left out."""

    kinds = ("sequences",)

    def __init__(self, config: DataConfig, path: Path) -> None:
        self.every, self.path = config.held_out, path

    def load(self, kind: str) -> Dataset:
        pairs: Pairs = []
        for number, line in enumerate(read_text(self.path).split("\n"), start=1):
            if not line:
                continue
            parts = line.split("\t")
            if len(parts) != 2 or not all(parts):
                got = f"{len(parts) - 1} tabs" if len(parts) != 2 else "nothing on one side of it"
                raise ValueError(f"{self.path}: line {number}: expected source, one tab, target, got {got}")
            pairs.append((parts[0], parts[1]))
        return sequence_dataset(str(self.path), pairs, self.every)
