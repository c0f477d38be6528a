"""Captions of images: from a table beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.data.text import read_text

TABLES = {"captions.tsv": "excel-tab", "metadata.csv": "excel"}
"""Names of tables, as in Hugging Face's image folders, and their dialects."""

FILE, TEXT = "file_name", "text"
EXAMPLES = 100


@dataclass(frozen=True)
class CaptionTable:
    """A UTF-8 table in a folder of images. Its first row names the columns, among them file_name and text.

    rows: (number, cells) of the rows that are not blank; numbers start at 1 and count blank rows.
    """

    folder: Path
    file: Path
    rows: Sequence[tuple[int, list[str]]]

    def captions(self, images: Sequence[Path]) -> list[str]:
        """The caption of each image.

        Args:
            images: paths relative to the folder.

        Raises:
            ValueError: a column is missing, a row has another length, an image does not exist, occurs twice or has no
                caption.
        """
        path = self.folder / self.file
        (_, names), *rows = self.rows
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
                reason = "which an earlier row has" if file in captions else "which does not exist"
                raise ValueError(f"{path}: row {number}: expected an image in the folder, got {file}, {reason}")
            if not text:
                raise ValueError(f"{path}: row {number}: expected a caption of {file}, got none")
            captions[file] = text
        for image in images:
            if image not in captions:
                raise ValueError(f"{path}: expected a caption of {image}, got none")
        return [captions[image] for image in images]


def read_captions(folder: Path, found: Sequence[Path]) -> CaptionTable | None:
    """The table among the files of a folder of images. A metadata.csv without a column ``text`` is no such table.

    Raises:
        ValueError: two tables, or one that can't be parsed.
    """
    tables = [CaptionTable(folder, Path(name), _rows(folder / name)) for name in TABLES if Path(name) in found]
    tables = [table for table in tables if table.file.name != "metadata.csv" or TEXT in table.rows[0][1]]
    if len(tables) > 1:
        names = " and ".join(str(table.file) for table in tables)
        raise ValueError(f"{folder}: expected captions in one file, got {names}")
    return tables[0] if tables else None


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(read_text(path)), TABLES[path.name], strict=True)
    try:
        return [(number, row) for number, row in enumerate(reader, start=1) if row]
    except csv.Error as error:
        raise ValueError(
            f"{path}: line {reader.line_num}: expected a table of columns, got one that fails: {error}"
        ) from error


def caption_examples(captions: Sequence[str]) -> tuple[str, ...]:
    """Up to ``EXAMPLES`` distinct captions, evenly spread."""
    distinct = list(dict.fromkeys(captions))
    count = min(EXAMPLES, len(distinct))
    return tuple(distinct[i * len(distinct) // count] for i in range(count))
