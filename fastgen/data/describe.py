"""A summary of a dataset, for looking at it before training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastgen.batch import detokenize
from fastgen.data._base import Dataset, Items
from fastgen.data.config import DataConfig
from fastgen.data.sources import choose_kind, open_source

EXAMPLES = 8
EXAMPLE_LENGTH = 64
INSPECTED, INSPECTED_LAZY = 20_000, 1_000
TINY, TINY_TEXT = 100, 10_000
FEW = 5
MOST_CHARACTERS, MOST_CLASSES = 120, 20
Examples: TypeAlias = Mapping[str, Tensor | list[str]]


@dataclass(frozen=True, eq=False)
class Description:
    """A summary of a dataset; ``str`` formats it for the terminal.

    Attributes:
        kinds: all kinds that the source can serve; ``kind`` is the one described.
        train, held_out: numbers of items (characters or tokens of text).
        facts: what a model's config may take from the data.
        classes: name -> number of items, both splits.
        value_range: smallest and largest value of pixels or audio samples.
        examples: by name, images (n, C, S, S) in [0, 1], waves (n, length), or strings.
        warnings: properties of the data that may harm training.
    """

    name: str
    kind: str
    kinds: Sequence[str]
    train: int
    held_out: int
    facts: Mapping[str, Any]
    fingerprint: str
    classes: Mapping[str, int]
    value_range: tuple[float, float] | None
    examples: Examples
    warnings: Sequence[str]

    def __str__(self) -> str:
        unit = _unit(self.kind, self.facts)
        others = [kind for kind in self.kinds if kind != self.kind]
        lines = [
            f"{self.name}: {self.kind}" + (f" (also {', '.join(others)})" if others else ""),
            f"  {self.train:,} {unit} to train on, {self.held_out:,} held out",
            *(f"  {name}: {_short(v)}" for name, v in self.facts.items() if self._is_shown(name)),
        ]
        if self.value_range:
            lines.append("  values from {:.4g} to {:.4g}".format(*self.value_range))
        if self.classes:
            lines.append("  items of each class: " + _counts(self.classes))
        lines.append(f"  fingerprint: {self.fingerprint}")
        for name, shown in self.examples.items():
            if isinstance(shown, list):
                lines += [f"  {name}:", *(f"    {text!r}" for text in shown)]
        return "\n".join(lines + [f"  warning: {warning}" for warning in self.warnings])

    def _is_shown(self, fact: str) -> bool:
        """False for captions where there are none, or none but the names of the classes."""
        examples = self.facts.get("caption_examples", ())
        captioned = bool(examples) and tuple(examples) != tuple(self.classes)
        return captioned or not fact.startswith("caption")


def describe(config: DataConfig, kind: str | None = None) -> Description:
    """Summarize a dataset; of a very large one, its first items. Errors are those of ``load_data``.

    Args:
        kind: the kind of data to load it as; default the first that the source can serve.
    """
    source = open_source(config)
    data = source.load(choose_kind(config, source, kind or source.kinds[0]))
    text = data.kind == "text"
    unit = _unit(data.kind, data.facts)
    train, held_out = len(data.train), len(data.held_out)
    splits = data.splits(min(EXAMPLE_LENGTH, train, held_out)) if text else data.splits()
    warnings = list(data.warnings)
    if train < (TINY_TEXT if text else TINY):
        warnings.append(f"only {train} {unit} to train on")
    few = [name for name, n in data.classes.items() if 0 < n < FEW]
    if few:
        warnings.append(f"classes with fewer than {FEW} items: {_short(', '.join(few))}")
    value_range = None
    if data.kind not in ("text", "sequences"):
        value_range, found = _inspect(splits, repeats=data.kind != "domains")
        warnings += found
    return Description(
        name=data.name,
        kind=data.kind,
        kinds=source.kinds,
        train=train,
        held_out=held_out,
        facts=data.facts,
        fingerprint=data.fingerprint,
        classes=data.classes,
        value_range=value_range,
        examples=_examples(data, splits[0]),
        warnings=warnings,
    )


def _unit(kind: str, facts: Mapping[str, Any]) -> str:
    """The unit that the splits are counted in."""
    if kind != "text":
        return "items"
    return "characters" if isinstance(facts["vocabulary"], str) else "tokens"


def _inspect(splits: tuple[Items, Items], repeats: bool) -> tuple[tuple[float, float], list[str]]:
    """(smallest and largest value, warnings) of floating-point items. ``repeats``: whether to count repeated items."""
    low, high, constant, repeated, leaked = float("inf"), float("-inf"), 0, 0, 0
    seen: set[bytes] = set()
    for items in splits:
        trained_on = set(seen)
        for indices in torch.arange(min(len(items), INSPECTED_LAZY if items.lazy else INSPECTED)).split(256):
            parts = [part.flatten(1) for part in items.batch(indices).values() if part.is_floating_point()]
            low = min(low, *(float(part.min()) for part in parts))
            high = max(high, *(float(part.max()) for part in parts))
            constant += int(torch.stack([(part == part[:, :1]).all(1) for part in parts]).any(0).sum())
            for row in torch.cat(parts, 1).numpy():
                row_hash = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
                leaked += row_hash in trained_on
                repeated += row_hash in seen
                seen.add(row_hash)
    warnings = [f"{constant:,} items of one value throughout"] if constant else []
    if repeats and repeated:
        warnings.append(f"{repeated:,} items occur before; {leaked:,} held-out ones are also trained on")
    return (low, high), warnings


def _examples(data: Dataset, train: Items) -> Examples:
    """Items spread over the training split."""
    n = min(EXAMPLES, len(train))
    batch = train.batch(torch.arange(n) * (len(train) // n))
    vocabulary = data.facts.get("vocabulary", "")
    if data.kind == "text":
        return {"text": ["".join(vocabulary[token] for token in row) for row in batch["tokens"].tolist()]}
    if data.kind == "sequences":
        sides = [[detokenize(row, vocabulary) for row in batch[side]] for side in ("source", "target")]
        return {"pairs": [f"{source} -> {target}" for source, target in zip(*sides, strict=True)]}
    return {name: part for name, part in batch.items() if part.is_floating_point()}


def _short(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} strings, the last ones {', '.join(map(repr, value[-FEW:]))}"
    text = value if isinstance(value, str) else str(value)
    length = f" ({len(text)} characters)" if len(text) > MOST_CHARACTERS else ""
    shown = text[:MOST_CHARACTERS] + ("..." if length else "")
    return (shown if shown.isprintable() else repr(shown)[1:-1]) + length


def _counts(classes: Mapping[str, int]) -> str:
    listed = [f"{name} {n:,}" for name, n in classes.items()]
    return ", ".join(listed[:MOST_CLASSES]) + (f", ... ({len(listed)} classes)" if len(listed) > MOST_CLASSES else "")
