"""Hugging Face datasets: from the Hub or its cache, saved to disk, or a Parquet file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data._base import Dataset, Source
from fastgen.data._files import read_bytes
from fastgen.data._optional import need
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import ImageStack, check_labels, count_levels, domain_dataset, image_dataset
from fastgen.data.images import EncodedImages, read_stack
from fastgen.data.splitting import at_least
from fastgen.data.text import text_dataset

PREFIX = "hf:"
CAPTION_COLUMNS = ("text", "caption")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def is_saved(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


class Table(Source):
    """The train split of a dataset, or its only one.

    ``config.source`` is hf:NAME, hf:NAME:CONFIGURATION, a folder written by ``save_to_disk``, or a .parquet file.

    Raises:
        FileNotFoundError: neither on the Hub nor in its cache, or no connection. ValueError: another format, no such
        column. ImportError: Hugging Face's ``datasets`` is not installed.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config, self.name, self.column = config, config.source, config.column
        self.library = need("datasets", "datasets", self.name, extra="datasets")
        self.rows = self._one_split(self._read())
        if self.column and self.column not in self.rows.column_names:
            known = ", ".join(self.rows.column_names)
            raise ValueError(f"{self.name}: column: expected one of {known}, got {self.column!r}")
        self.kinds = self._kinds()
        self.options = frozenset(("column",))
        self.options |= {"image_size"} if "images" in self.kinds else set()
        self.options |= {"tokens"} if "text" in self.kinds else set()

    def load(self, kind: str) -> Dataset:
        if kind == "text":
            return self._text()
        images = self._images()
        if kind == "domains":
            return domain_dataset(images, self.config.held_out)
        column = next((name for name in self._columns("text") if name in CAPTION_COLUMNS), None)
        captions = [row or "" for row in self.rows[column][:]] if column else []
        return image_dataset(dataclasses.replace(images, captions=captions), self.config.held_out)

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
            if self.name.lower().endswith(".parquet"):
                table = need("pyarrow.parquet", "pyarrow", self.name, extra="datasets").read_table(self.name)
                return self.library.Dataset(self.library.table.InMemoryTable(table))
            return self.library.load_from_disk(self.name)
        except Exception as error:
            raise ValueError(
                f"{self.name}: expected a Hugging Face dataset, got one that fails: {_one_line(error)}"
            ) from error

    def _one_split(self, read: Any) -> Any:
        if not isinstance(read, dict):
            return read
        if "train" not in read and len(read) != 1:
            raise ValueError(f"{self.name}: expected a split called train, or only one, got {', '.join(read)}")
        return read["train"] if "train" in read else next(iter(read.values()))

    def _columns(self, kind: str) -> list[str]:
        """Names of the columns of images, or of strings."""
        if kind == "text":
            return [
                name
                for name, feature in self.rows.features.items()
                if getattr(feature, "dtype", "") in ("string", "large_string")
            ]
        return [name for name, feature in self.rows.features.items() if isinstance(feature, self.library.Image)]

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
            types = ", ".join(
                f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in self.rows.features.items()
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
            raise ValueError(f"{self.name}: expected one column of {kind}, got {', '.join(columns)}: --column chooses")
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

    def _images(self) -> ImageStack:
        column, label_column = self._only("images"), self._label_column()
        at_least(self.name, len(self.rows), "images")
        labels, names = None, ()
        if label_column:
            labels = check_labels(self.name, np.asarray(self.rows[label_column][:]), len(self.rows))
            names = getattr(self.rows.features[label_column], "names", None) or ()
        encoded = self.rows.select_columns([column]).cast_column(column, self.library.Image(decode=False))
        stack, contents = read_stack(self.name, ImageCells(self.name, encoded, column), self.config.image_size)
        return ImageStack(self.name, stack, contents, *count_levels(stack), labels, names)


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
