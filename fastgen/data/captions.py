"""Captions of images: from a table beside them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.data.text import decode_text
from fastgen.data.trees import Tree

TABLES = {"captions.tsv": "excel-tab", "metadata.csv": "excel", "metadata.jsonl": ""}
"""Names of tables, two of them as in Hugging Face's image folders, and their dialects; "": JSON Lines."""

FILE, TEXT = "file_name", "text"
EXAMPLES = 100


@dataclass(frozen=True)
class CaptionTable:
    """A UTF-8 table in a folder of images. Its first row names the columns, among them file_name and text.

    A captions.tsv of two columns whose first row begins with an image needs no names: file, caption.

    Attributes:
        place: the table, for messages.
        file: its path in the source. The files in its rows are relative to its folder.
        rows: (number, cells) of the rows that are not blank; numbers start at 1 and count blank rows.
    """

    place: str
    file: Path
    rows: Sequence[tuple[int, list[str]]]

    @property
    def has_texts(self) -> bool:
        """False for a metadata.csv or metadata.jsonl without captions, which says something else of the images."""
        return self.file.name == "captions.tsv" or bool(self.rows and TEXT in self.rows[0][1])

    def captions(self, images: Collection[Path]) -> dict[Path, str]:
        """The caption of each image.

        Args:
            images: paths in the source; those of the table are relative to its folder.

        Raises:
            ValueError: a column is missing, a row has another length, an image does not exist, occurs twice or has no
                caption.
        """
        (_, names), *rows = self.rows
        known = set(images)
        if TEXT not in names and len(names) == 2 and self.file.parent / names[0] in known:
            names, rows = [FILE, TEXT], list(self.rows)
        for column in (FILE, TEXT):
            if column not in names:
                raise ValueError(f"{self.place}: expected columns {FILE} and {TEXT}, got {', '.join(names)}")
            if names.count(column) > 1:
                raise ValueError(f"{self.place}: expected one column {column}, got {names.count(column)}")
        captions: dict[Path, str] = {}
        for number, row in rows:
            if len(row) != len(names):
                raise ValueError(f"{self.place}: row {number}: expected {len(names)} columns, got {len(row)}")
            name, text = row[names.index(FILE)], row[names.index(TEXT)].strip()
            file = self.file.parent / name
            if file not in known or file in captions:
                reason = "which an earlier row has" if file in captions else "which does not exist"
                raise ValueError(f"{self.place}: row {number}: expected an image in the folder, got {name}, {reason}")
            if not text:
                raise ValueError(f"{self.place}: row {number}: expected a caption of {name}, got none")
            captions[file] = text
        for image in sorted(known):
            if image not in captions:
                raise ValueError(f"{self.place}: expected a caption of {image}, got none")
        return captions


def read_captions(tree: Tree, folder: Path = Path()) -> CaptionTable | None:
    """The table directly in a folder of images; None where there is none, or only one without captions.

    Raises:
        ValueError: two tables, or one that can't be parsed.
    """
    there = [folder / name for name in TABLES if folder / name in tree.files]
    tables = [table for table in (_read_table(tree, file) for file in there) if table.has_texts]
    if len(tables) > 1:
        names = " and ".join(str(table.file) for table in tables)
        raise ValueError(f"{tree.name}: expected captions in one file, got {names}")
    return tables[0] if tables else None


def _read_table(tree: Tree, file: Path) -> CaptionTable:
    place = tree.place(file)
    text = decode_text(tree.read(file), place)
    dialect = TABLES[file.name]
    return CaptionTable(place, file, _rows(text, place, dialect) if dialect else _json_rows(text, place))


def _rows(text: str, place: str, dialect: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text), dialect, strict=True)
    try:
        return [(number, row) for number, row in enumerate(reader, start=1) if row]
    except csv.Error as error:
        raise ValueError(
            f"{place}: line {reader.line_num}: expected a table of columns, got one that fails: {error}"
        ) from error


def _json_rows(text: str, place: str) -> list[tuple[int, list[str]]]:
    """A row of names, those of all objects, then the cells of each object.

    Raises:
        ValueError: a file name or a caption that is no string.
    """
    objects = json_lines(text, place)
    names = list(dict.fromkeys(name for _, each in objects for name in each))
    rows = [(0, names)]
    for number, each in objects:
        for name in (FILE, TEXT):
            if TEXT in names and not isinstance(each.get(name, ""), str):
                got = json.dumps(each[name])
                raise ValueError(f"{place}: line {number}: expected a string as {name}, got {got}")
        rows.append((number, [str(each.get(name, "")) for name in names]))
    return rows


def json_lines(text: str, place: str) -> list[tuple[int, dict[str, object]]]:
    """(number of the line, object) of JSON Lines; blank lines are left out. ValueError names line and file."""
    objects = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=_unique)
            if "\\ud" in line.lower():  # an escape that may be half of a character
                json.dumps(found, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: line {number}: expected a JSON object, got one that fails: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{place}: line {number}: expected a JSON object, got {type(found).__name__}")
        objects.append((number, found))
    return objects


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. ValueError: a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} occurs twice")
    return found


def caption_examples(captions: Sequence[str]) -> tuple[str, ...]:
    """Up to ``EXAMPLES`` distinct captions, evenly spread."""
    distinct = list(dict.fromkeys(captions))
    count = min(EXAMPLES, len(distinct))
    return tuple(distinct[i * len(distinct) // count] for i in range(count))
