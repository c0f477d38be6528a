"""Hugging Face data sets: of the hub or its cache, saved to disk, or a Parquet file."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data._base import Dataset
from fastgen.data._files import read_bytes
from fastgen.data._optional import need
from fastgen.data.folders import from_files
from fastgen.data.image_sets import Pictures, check_labels, domain_dataset, image_dataset
from fastgen.data.pictures import Files
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


class Table:
    """The train split of a data set, or its only one.

    Args:
        source: hf:NAME, hf:NAME:CONFIGURATION, a folder written by ``save_to_disk``, or a .parquet file.

    Raises:
        FileNotFoundError: neither on the hub nor in its cache, or no connection. ValueError: another format, no such
        column. ImportError: without Hugging Face's ``datasets``.
    """

    def __init__(self, source: str, column: str) -> None:
        self.name, self.column = source, column
        self.library = need("datasets", "datasets", source, extra="datasets")
        self.rows = self._one_split(self._read())
        if column and column not in self.rows.column_names:
            raise ValueError(f"{source}: column: expected one of {', '.join(self.rows.column_names)}, got {column!r}")

    def _read(self) -> Any:
        if self.name.startswith(PREFIX):
            name, _, configuration = self.name.removeprefix(PREFIX).partition(":")
            if not name:
                raise ValueError(f"{self.name}: expected hf:NAME or hf:NAME:CONFIGURATION, got no name")
            try:
                return self.library.load_dataset(name, configuration or None)
            except Exception as error:
                raise FileNotFoundError(
                    f"{self.name}: expected a data set of the Hugging Face hub or its cache, got: {_one_line(error)}"
                ) from error
        try:
            if self.name.lower().endswith(".parquet"):
                table = need("pyarrow.parquet", "pyarrow", self.name, extra="datasets").read_table(self.name)
                return self.library.Dataset(self.library.table.InMemoryTable(table))
            return self.library.load_from_disk(self.name)
        except Exception as error:
            raise ValueError(
                f"{self.name}: expected a Hugging Face data set, got one that fails: {_one_line(error)}"
            ) from error

    def _one_split(self, read: Any) -> Any:
        if not isinstance(read, dict):
            return read
        if "train" not in read and len(read) != 1:
            raise ValueError(f"{self.name}: expected a split called train, or only one, got {', '.join(read)}")
        return read["train"] if "train" in read else next(iter(read.values()))

    def _columns(self, kind: str) -> list[str]:
        """Names of the columns that hold pictures, or text."""
        if kind == "text":
            return [
                name
                for name, of in self.rows.features.items()
                if getattr(of, "dtype", "") in ("string", "large_string")
            ]
        return [name for name, of in self.rows.features.items() if isinstance(of, self.library.Image)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that the columns, or the chosen one, can serve."""
        found = []
        if self._fits("images"):
            labels = self._label_column()
            names = getattr(self.rows.features[labels], "names", None) if labels else None
            found += ["images", "domains"] if names is not None and len(names) == 2 else ["images"]
        if self._fits("text"):
            found.append("text")
        if not found:
            types = ", ".join(f"{name} ({getattr(of, 'dtype', of)})" for name, of in self.rows.features.items())
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

    def text(self, every: int, count: int = 0) -> Dataset:
        """The rows of a column of strings, joined by line ends; empty ones (None) left out."""
        rows = self.rows.select_columns([self._only("text")])
        joined = "\n".join(row for batch in rows.iter(1000) for row in next(iter(batch.values())) if row is not None)
        return text_dataset(self.name, joined, every, count)

    def images(self, image_size: int, every: int) -> Dataset:
        column = next((name for name in self._columns("text") if name in CAPTION_COLUMNS), None)
        captions = [row or "" for row in self.rows[column][:]] if column else []
        return image_dataset(dataclasses.replace(self._pictures(image_size), captions=captions), every)

    def domains(self, image_size: int, every: int) -> Dataset:
        return domain_dataset(self._pictures(image_size), every)

    def _label_column(self) -> str | None:
        """Numbers of classes: a column that is called so and holds integers."""
        types = {name: str(getattr(self.rows.features.get(name), "dtype", "")) for name in LABEL_COLUMNS}
        return next((name for name, of in types.items() if of.startswith(("int", "uint"))), None)

    def _pictures(self, image_size: int) -> Pictures:
        column, label_column = self._only("images"), self._label_column()
        at_least(self.name, len(self.rows), "images")
        labels, names = None, ()
        if label_column:
            labels = check_labels(self.name, np.asarray(self.rows[label_column][:]), len(self.rows))
            names = getattr(self.rows.features[label_column], "names", None) or ()
        encoded = self.rows.select_columns([column]).cast_column(column, self.library.Image(decode=False))
        files = Files([f"{self.name}: row {i}" for i in range(len(encoded))], partial(_encoded, encoded, column))
        pictures = from_files(self.name, files, image_size)
        return dataclasses.replace(pictures, labels=labels, class_names=names)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _encoded(rows: Any, column: str, i: int) -> bytes:
    cell = rows[i][column] or {}
    if cell.get("bytes") is None and cell.get("path"):
        return read_bytes(Path(cell["path"]))
    return bytes(cell.get("bytes") or b"")
