"""Captions of pictures: from a table beside them, or the names of their classes; as tokens."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data.text import read_text

TABLES = {"captions.tsv": "excel-tab", "metadata.csv": "excel"}
"""Names of tables, as Hugging Face's image folders have them, and their dialects."""

FILE, TEXT = "file_name", "text"
EXAMPLES = 100


def find_captions(folder: Path, found: Sequence[Path]) -> Path | None:
    """The table in a folder of pictures; a metadata.csv without a column ``text`` is none. ValueError for two."""
    tables = [
        Path(name)
        for name, dialect in TABLES.items()
        if Path(name) in found and (name != "metadata.csv" or TEXT in _rows(folder / name, dialect)[0][1])
    ]
    if len(tables) > 1:
        raise ValueError(f"{folder}: expected captions in one file, got {' and '.join(map(str, tables))}")
    return tables[0] if tables else None


def read_captions(folder: Path, table: Path, images: Sequence[Path]) -> list[str]:
    """The caption of each picture.

    Args:
        table: UTF-8, in the folder; its first row names the columns, among them file_name, the path of a picture in
            the folder, and text.
        images: paths in the folder.

    Raises:
        ValueError: a column missing, a row of another length, a picture that is not there, or is there twice, or has
            no caption.
    """
    path = folder / table
    (_, names), *rows = _rows(path, TABLES[table.name])
    for column in (FILE, TEXT):
        if column not in names:
            raise ValueError(f"{path}: expected columns {FILE} and {TEXT}, got {', '.join(names)}")
    captions: dict[Path, str] = {}
    known = set(images)
    for number, row in rows:
        if len(row) != len(names):
            raise ValueError(f"{path}: row {number}: expected {len(names)} columns, got {len(row)}")
        file, text = Path(row[names.index(FILE)]), row[names.index(TEXT)].strip()
        if file not in known or file in captions:
            what = "another one: it is there before" if file in captions else "one that is not there"
            raise ValueError(f"{path}: row {number}: expected a picture in the folder, got {file}, {what}")
        if not text:
            raise ValueError(f"{path}: row {number}: expected a caption of {file}, got none")
        captions[file] = text
    for image in images:
        if image not in captions:
            raise ValueError(f"{path}: expected a caption of {image}, got none")
    return [captions[image] for image in images]


def _rows(path: Path, dialect: str) -> list[tuple[int, list[str]]]:
    """(number, cells) of the rows that are not blank; numbers count from 1, blank rows too, as a spreadsheet does."""
    reader = csv.reader(io.StringIO(read_text(path)), dialect, strict=True)
    try:
        return [(number, row) for number, row in enumerate(reader, start=1) if row]
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {reader.line_num}: expected a table of columns, got one that fails: {error}"
        ) from error


def caption_tokens(captions: Sequence[str]) -> tuple[Tensor, str]:
    """((N, longest) int64, padded with 0 at the end; the vocabulary, sorted: its character i is token 1 + i)."""
    vocabulary = "".join(sorted(set("".join(captions))))
    number = {character: 1 + i for i, character in enumerate(vocabulary)}
    tokens = torch.zeros(len(captions), max(map(len, captions), default=0), dtype=torch.int64)
    for row, caption in zip(tokens, captions, strict=True):
        row[: len(caption)] = torch.tensor([number[character] for character in caption])
    return tokens, vocabulary


def examples(captions: Sequence[str]) -> tuple[str, ...]:
    """Some of them, evenly spread, none twice."""
    distinct = list(dict.fromkeys(captions))
    count = min(EXAMPLES, len(distinct))
    return tuple(distinct[i * len(distinct) // count] for i in range(count))
