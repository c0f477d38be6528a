"""Files in a user's folder, and the images among them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Set
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data._base import Dataset
from fastgen.data._files import cannot_read, check_file, read_bytes
from fastgen.data.captions import read_captions
from fastgen.data.image_sets import Pictures, count_levels, domain_dataset, image_dataset, pair_dataset
from fastgen.data.pictures import SUFFIXES, Files, LazyPictures, read_headers, read_stack
from fastgen.data.splitting import at_least, hold_out

SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))
ABOUT_FILES = re.compile(r"(readme|licen[sc]e|copying|notice|authors|changelog|changes)\b", re.IGNORECASE)
"""Beginnings of the names of files about the others."""

SPLITS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation"))


def files_below(folder: Path) -> list[Path]:
    """Paths relative to the folder, sorted by their parts. Links are followed; hidden files and folders, and those that
    Windows leaves in folders, left out.

    Raises:
        OSError: a folder that can't be read; names it.
    """
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above itself
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(here, name).relative_to(folder) for name in files if not _is_system_file(name)]
    return sorted(found, key=lambda path: path.parts)


def _is_system_file(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _raise(error: OSError) -> None:
    raise cannot_read(error.filename, error) from error


def with_suffix(files: list[Path], suffixes: Set[str]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in suffixes]


def outnumbering(files: list[Path], found: list[Path], stronger: list[Path]) -> str:
    """Files of other types that make it unlikely that a folder is one of ``files``; "" if there are none.

    They are more than ``files``, without those about the others (README.txt) and those that belong to one of another
    type by their name (00.txt to 00.png).

    Args:
        files: of one type. found: all. stronger: files of types to which ``files`` belong, not the reverse.
    """
    chosen, above = set(files), {file.stem for file in stronger}
    others = [file for file in found if file not in chosen and not ABOUT_FILES.match(file.name)]
    if not files or not others:
        return ""
    mine = [file for file in files if file.stem not in above and not ABOUT_FILES.match(file.name)]
    names, kept = {file.stem for file in mine}, set(stronger)
    groups: dict[str, list[Path]] = {}
    for file in others:
        if file in kept or file.stem not in names:
            suffix = file.suffix.lower()
            groups.setdefault("images" if suffix in SUFFIXES else suffix, []).append(file)
    more = [file for group in groups.values() if len(group) > len(mine) for file in group]
    return suffixes_of(more) if more else ""


def suffixes_of(files: list[Path]) -> str:
    """How many files there are of each kind, for messages: "3 .jpg, 1 without a suffix"."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    return ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items())) or "no files"


class ImageFolder:
    """Pictures directly in a folder (no classes), or in subfolders (each a class, in sorted order).

    table: of their captions, if there is one.

    Raises:
        ValueError: both, or subfolders that are named like splits.
    """

    def __init__(self, folder: Path, files: list[Path], table: Path | None = None) -> None:
        self.folder, self.files, self.table = folder, files, table
        self.class_names = sorted({file.parts[0] for file in files if len(file.parts) > 1})
        direct = [file for file in files if len(file.parts) == 1]
        if direct and self.class_names:
            raise ValueError(
                f"{folder}: expected images directly inside or in subfolders, one for each class, "
                f"got both ({direct[0]} and {self.class_names[0]}{os.sep})"
            )
        if len(self.class_names) > 1 and SPLITS.issuperset(name.lower() for name in self.class_names):
            raise ValueError(
                f"{folder}: expected subfolders that are classes, got {', '.join(self.class_names)}: give one of them"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        if self.class_names == ["inputs", "targets"]:
            return ("pairs", "images", "domains")
        return ("images", "domains") if len(self.class_names) == 2 else ("images",)

    def images(self, image_size: int, every: int) -> Dataset:
        captions = read_captions(self.folder, self.table, self.files) if self.table else []
        return image_dataset(dataclasses.replace(self._pictures(image_size), captions=captions), every)

    def domains(self, image_size: int, every: int) -> Dataset:
        return domain_dataset(self._pictures(image_size), every)

    def pairs(self, image_size: int, every: int) -> Dataset:
        """Of inputs/ and targets/: files of equal names, but for the suffix, belong together."""
        inputs, targets = self._by_stem("inputs"), self._by_stem("targets")
        for stem in sorted(inputs.keys() ^ targets.keys()):
            place = "inputs" if stem in targets else "targets"
            raise ValueError(f"{self.folder}: expected a picture {stem} in {place}{os.sep} too, got none")
        at_least(str(self.folder), len(inputs), "pairs")
        left, right = (
            _pictures(str(self.folder), self.folder, [side[stem] for stem in sorted(side)], image_size)
            for side in (inputs, targets)
        )
        if left.stack.shape[2] != right.stack.shape[2]:
            raise ValueError(
                f"{self.folder}: expected inputs and targets of one size, got {left.stack.shape[2]} and "
                f"{right.stack.shape[2]}: --image-size resizes and crops them"
            )
        return pair_dataset(left, right, *hold_out(len(inputs), every))

    def _pictures(self, image_size: int) -> Pictures:
        at_least(str(self.folder), len(self.files), "images")
        labels = None
        if len(self.class_names) > 1:
            number = {name: i for i, name in enumerate(self.class_names)}
            labels = torch.tensor([number[file.parts[0]] for file in self.files])
        pictures = _pictures(str(self.folder), self.folder, self.files, image_size)
        names = self.class_names if labels is not None else []
        return dataclasses.replace(pictures, labels=labels, class_names=names)

    def _by_stem(self, side: str) -> dict[Path, Path]:
        """Name without side and suffix -> file."""
        found: dict[Path, Path] = {}
        for file in self.files:
            if file.parts[0] == side:
                stem = file.relative_to(side).with_suffix("")
                if stem in found:
                    raise ValueError(
                        f"{self.folder}: expected one picture {side}{os.sep}{stem}, got {found[stem]}, {file}"
                    )
                found[stem] = file
        return found


def _read(folder: Path, files: list[Path], i: int) -> bytes:
    return read_bytes(folder / files[i])


def _pictures(name: str, folder: Path, files: list[Path], image_size: int) -> Pictures:
    return from_files(name, Files([str(folder / file) for file in files], partial(_read, folder, files)), image_size)


def from_files(name: str, files: Files, image_size: int) -> Pictures:
    """Encoded pictures, as grey ones where every file says that it is grey, else in colour."""
    headers = read_headers(files)
    channels = 1 if all(header.grey for header in headers) else 3
    stack = read_stack(name, files, headers, image_size, channels)
    contents = b"".join(header.digest for header in headers)
    return Pictures(name, stack, contents, *count_levels(stack))


def read_pictures(path: Path, image_size: int, channels: int) -> Tensor:
    """A person's own pictures, one file or all below a folder, in the order of their names: (N, channels, S, S) uint8.

    Args:
        image_size: S; the shorter side is resized to it, the centre cropped. channels: 1 (grey) or 3.

    Raises:
        FileNotFoundError: nothing there. OSError: a file that can't be read. ValueError: no pictures, or one that
        can't be decoded.
    """
    if not path.is_dir():
        check_file(path, "a picture or a folder of them")
    files = with_suffix(files_below(path), SUFFIXES) if path.is_dir() else [Path(path.name)]
    if not files:
        raise ValueError(f"{path}: expected pictures (.png, .jpg, ...) in it, got {suffixes_of(files_below(path))}")
    folder = path if path.is_dir() else path.parent
    read = Files([str(folder / file) for file in files], partial(_read, folder, files))
    lazy = LazyPictures(read, torch.arange(len(read)), channels, image_size, resize=True)
    return lazy[torch.arange(len(read))]
