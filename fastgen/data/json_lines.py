"""JSON Lines of text, or of pairs of sequences: one object in each line."""

from __future__ import annotations

from pathlib import Path

from fastgen.data._base import Dataset, Source
from fastgen.data._files import FEW_COLUMNS, few
from fastgen.data.captions import json_lines
from fastgen.data.config import DataConfig
from fastgen.data.sequences import Pairs, sequence_dataset
from fastgen.data.splitting import at_least
from fastgen.data.text import read_text, text_dataset

TEXT_NAMES = ("text", "content")
PAIR_NAMES = (("source", "target"), ("input", "output"), ("prompt", "completion"))


class JsonLines(Source):
    """A UTF-8 file with a JSON object in each line; blank lines are left out.

    Objects with ``text`` (or ``content``, or the field that ``config.column`` names) are texts, which are joined by
    line ends. Those with ``source`` and ``target`` (or ``input`` and ``output``, ``prompt`` and ``completion``) are
    pairs of sequences.

    Raises:
        ValueError: no JSON Lines, no such fields, a field that is no string, or one that an object lacks.
    """

    def __init__(self, config: DataConfig, path: Path) -> None:
        self.config, self.path = config, path
        self.rows = json_lines(read_text(path), str(path))
        names = list(self.rows[0][1])
        strings = [name for name in names if isinstance(self.rows[0][1][name], str)]
        if config.column and config.column not in names:
            raise ValueError(f"{path}: column: expected one of {few(names, FEW_COLUMNS)}, got {config.column!r}")
        self.pair = next((pair for pair in PAIR_NAMES if {*pair} <= {*strings}), None)
        known = [name for name in TEXT_NAMES if name in strings] or (strings if len(strings) == 1 else [])
        self.column = config.column or next(iter(known), "")
        if not (config.column or self.pair or {*TEXT_NAMES} & {*strings}):
            # A field of a known name that is no string, unless one other field can be the text.
            pair = next((pair for pair in PAIR_NAMES if {*pair} <= {*names}), ())
            for name in pair or ([] if known else [name for name in TEXT_NAMES if name in names]):
                self._string(*self.rows[0], name)
        if config.column:
            self.kinds: tuple[str, ...] = ("text",)
        else:
            self.kinds = (*(("sequences",) if self.pair else ()), *(("text",) if self.column else ()))
        if not self.kinds:
            raise ValueError(
                f"{path}: expected objects with text, or with source and target, got "
                f"{few(names, FEW_COLUMNS) or 'no fields'}"
                ": --column chooses a field of text"
            )
        self.options = frozenset(("column", "tokens") if "text" in self.kinds else ())

    def load(self, kind: str) -> Dataset:
        name, every = self.config.source, self.config.held_out
        if kind == "text":
            text = "\n".join(self._string(number, row, self.column) for number, row in self.rows)
            return text_dataset(name, text, every, self.config.tokens)
        assert self.pair is not None
        source, target = self.pair
        pairs: Pairs = []
        for number, row in self.rows:
            pairs.append((self._string(number, row, source), self._string(number, row, target)))
            if not all(pairs[-1]):
                raise ValueError(f"{self.path}: line {number}: expected a {source} and a {target}, got an empty one")
        at_least(name, len(pairs), "pairs")
        return sequence_dataset(name, pairs, every)

    def _string(self, number: int, row: dict[str, object], name: str) -> str:
        value = row.get(name)
        if not isinstance(value, str):
            got = "none" if value is None else type(value).__name__
            raise ValueError(f"{self.path}: line {number}: expected a string as {name}, got {got}")
        return value
