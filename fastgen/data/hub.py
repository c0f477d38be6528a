"""Hugging Face datasets: from the Hub or its cache, saved to disk, or Parquet files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data._base import Dataset
from fastgen.data._files import FEW_COLUMNS, few, read_bytes
from fastgen.data._optional import need
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import ImageSource, ImageStack, check_labels, count_levels
from fastgen.data.images import EncodedImages, read_stack
from fastgen.data.text import text_dataset

PREFIX = "hf:"
CAPTION_COLUMNS = ("text", "caption")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
HELD_OUT_NAME = re.compile(r"(test|validation|valid(?![a-z])|val(?![a-z])|dev(?![a-z]))", re.IGNORECASE)
"""Beginnings of the names of Parquet files of the test and the validation split."""
BYTES = ("binary", "large_binary")


def is_saved(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


class Table(ImageSource):
    """The train split of a dataset, or its only one. Its test split, or else its validation split, is held out of
    images.

    ``config.source`` is hf:NAME, hf:NAME:CONFIGURATION, a folder written by ``save_to_disk``, a .parquet file, or a
    folder of them, ``shards``: names that begin with test or validation are of those splits.

    Raises:
        FileNotFoundError: neither on the Hub nor in its cache, or no connection. ValueError: another format, no such
        column. ImportError: Hugging Face's ``datasets`` is not installed.
    """

    def __init__(self, config: DataConfig, shards: Sequence[Path] = (), rows: Any = None) -> None:
        self.config, self.name, self.column = config, config.source, config.column
        self.splits: list[str] = []
        self.held = ""
        self.parquet = [*shards] or ([Path(self.name)] if self.name.lower().endswith(".parquet") else [])
        if self.parquet:
            need("pyarrow.parquet", "pyarrow", self.name, extra="datasets")
        self.library = need("datasets", "datasets", self.name, extra="datasets")
        if rows is None:
            read = self._read()
            names = [*read] if isinstance(read, dict) else []
            held = next((name for name in TEST_SPLITS if name in names), "")
            rows = self._one_split(read)
            if held and "train" in names and not config.test_data:
                self.test, self.held = Table(config, rows=read[held]), held
            self.splits = names if "train" in names else []
        self.rows = rows
        if self.column and self.column not in self.rows.column_names:
            known = few(self.rows.column_names, FEW_COLUMNS)
            raise ValueError(f"{self.name}: column: expected one of {known}, got {self.column!r}")
        self.kinds = self._kinds()
        self.options = frozenset(("column",))
        self.options |= {"image_size", "binarize", "skip_broken", "test_data"} if "images" in self.kinds else set()
        self.options |= {"tokens"} if "text" in self.kinds else set()

    def load(self, kind: str) -> Dataset:
        data = self._text() if kind == "text" else super().load(kind)
        used, splits = [self._only(kind if kind == "text" else "images")], {"train"}
        if kind != "text":
            used += [name for name in (self._label_column(), self._caption_column()) if name]
            splits.add(self.held)
        left = {
            "columns": [name for name in self.rows.column_names if name not in used],
            "splits": [name for name in self.splits if name not in splits],
        }
        notes = [f"{what} that are not read: {few(names, FEW_COLUMNS)}" for what, names in left.items() if names]
        return dataclasses.replace(data, warnings=(*notes, *data.warnings))

    def read(self, like: ImageStack | None = None) -> ImageStack:
        images, kept = self._images(channels=like.stack.shape[1] if like else 0)
        column = self._caption_column()
        rows = self.rows[column][:] if column else []
        return dataclasses.replace(images, captions=[rows[i] or "" for i in kept] if column else ())

    def _read(self) -> Any:
        if self.name.startswith(PREFIX):
            name, _, configuration = self.name.removeprefix(PREFIX).partition(":")
            if not name:
                raise ValueError(f"{self.name}: expected hf:NAME or hf:NAME:CONFIGURATION, got no name")
            try:
                return self.library.load_dataset(name, configuration or None)
            except Exception as error:
                raise FileNotFoundError(
                    f"{self.name}: expected a dataset of the Hugging Face Hub or its cache, got: {_one_line(error)}"
                ) from error
        try:
            if self.parquet:
                splits = {name: self._table(files) for name, files in _by_split(self.parquet).items()}
                return next(iter(splits.values())) if len(splits) == 1 else splits
            return self.library.load_from_disk(self.name)
        except Exception as error:
            expected = "a Hugging Face dataset"
            if self.parquet:
                expected = "a Parquet file" if len(self.parquet) == 1 else "Parquet files with the same columns"
            raise ValueError(f"{self.name}: expected {expected}, got one that fails: {_one_line(error)}") from error

    def _table(self, files: Sequence[Path]) -> Any:
        """Parquet files as rows, mapped from disk."""
        parquet = need("pyarrow.parquet", "pyarrow", self.name, extra="datasets")
        tables = [
            self.library.Dataset(self.library.table.InMemoryTable(parquet.read_table(file, memory_map=True)))
            for file in files
        ]
        return tables[0] if len(tables) == 1 else self.library.concatenate_datasets(tables)

    def _one_split(self, read: Any) -> Any:
        if not isinstance(read, dict):
            return read
        if "train" not in read and len(read) != 1:
            raise ValueError(f"{self.name}: expected a split called train, or only one, got {few(read, FEW_COLUMNS)}")
        return read["train"] if "train" in read else next(iter(read.values()))

    def _columns(self, kind: str) -> list[str]:
        """Names of the columns of images, or of strings."""
        if kind == "text":
            return [
                name
                for name, feature in self.rows.features.items()
                if getattr(feature, "dtype", "") in ("string", "large_string")
            ]
        return [name for name, feature in self.rows.features.items() if self._is_image(feature)]

    def _is_image(self, feature: Any) -> bool:
        """Encoded images: a column of the library's own, or of bytes, alone or beside a path, as others write them."""
        if isinstance(feature, dict):
            return "bytes" in feature and getattr(feature["bytes"], "dtype", "") in BYTES
        return isinstance(feature, self.library.Image) or getattr(feature, "dtype", "") in BYTES

    def _kinds(self) -> tuple[str, ...]:
        """The kinds that the columns, or the chosen one, can serve."""
        found = []
        if self._fits("images"):
            labels = self._label_column()
            names = getattr(self.rows.features[labels], "names", None) if labels else None
            found += ["images", "domains"] if names is not None and len(names) == 2 else ["images"]
        if self._fits("text"):
            found.append("text")
        if not found:
            types = few(
                [f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in self.rows.features.items()],
                FEW_COLUMNS,
            )
            raise ValueError(f"{self.name}: expected a column of images or of strings, got {types or 'no columns'}")
        return tuple(found)

    def _fits(self, kind: str) -> bool:
        columns = self._columns(kind)
        return self.column in columns if self.column else bool(columns)

    def _only(self, kind: str) -> str:
        if self.column:
            return self.column
        columns = self._columns(kind)
        if len(columns) != 1:
            raise ValueError(
                f"{self.name}: expected one column of {kind}, got {few(columns, FEW_COLUMNS)}: --column chooses"
            )
        return columns[0]

    def _text(self) -> Dataset:
        """The rows of a column of strings, joined by line ends; empty ones (None) are left out."""
        rows = self.rows.select_columns([self._only("text")])
        joined = "\n".join(row for batch in rows.iter(1000) for row in next(iter(batch.values())) if row is not None)
        return text_dataset(self.name, joined, self.config.held_out, self.config.tokens)

    def _label_column(self) -> str | None:
        """The column of class labels: integers under one of the usual names."""
        types = {name: str(getattr(self.rows.features.get(name), "dtype", "")) for name in LABEL_COLUMNS}
        return next((name for name, dtype in types.items() if dtype.startswith(("int", "uint"))), None)

    def _caption_column(self) -> str | None:
        return next((name for name in self._columns("text") if name in CAPTION_COLUMNS), None)

    def _images(self, channels: int) -> tuple[ImageStack, list[int]]:
        """The images, and the rows that they are in."""
        column, label_column = self._only("images"), self._label_column()
        encoded = self.rows.select_columns([column]).cast_column(column, self.library.Image(decode=False))
        read = read_stack(
            self.name,
            ImageCells(self.name, encoded, column),
            self.config.image_size,
            skip_broken=self.config.skip_broken,
            channels=channels,
        )
        labels, names = None, ()
        if label_column:
            numbers = np.asarray(self.rows[label_column][:])[read.kept]
            labels = check_labels(self.name, numbers, len(read.kept))
            names = getattr(self.rows.features[label_column], "names", None) or ()
        levels = count_levels(read.stack)
        stack = ImageStack(self.name, read.stack, read.contents, *levels, labels, names, notes=read.notes)
        return stack, read.kept


def _by_split(files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, by the beginnings of their names or the names of their folders."""
    found: dict[str, list[Path]] = {}
    for file in files:
        held = HELD_OUT_NAME.match(file.name) or HELD_OUT_NAME.fullmatch(file.parent.name)
        split = "train" if held is None else TEST_SPLITS[0 if held[1].lower() == "test" else 1]
        found.setdefault(split, []).append(file)
    return found


@dataclasses.dataclass(frozen=True)
class ImageCells(EncodedImages):
    """Images in a column of a table."""

    table: str
    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        return f"{self.table}: row {i}"

    def read(self, i: int) -> bytes:
        cell = self.rows[i][self.column] or {}
        if cell.get("bytes") is None and cell.get("path"):
            return read_bytes(Path(cell["path"]))
        return bytes(cell.get("bytes") or b"")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
