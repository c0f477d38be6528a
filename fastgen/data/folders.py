"""Folders of files, and of images."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data._base import Dataset, Source
from fastgen.data._files import cannot_read, check_file
from fastgen.data.captions import CaptionTable
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import ImageStack, count_levels, domain_dataset, image_dataset, pair_dataset
from fastgen.data.images import SUFFIXES, ImageFiles, LazyImages, read_stack
from fastgen.data.splitting import at_least, hold_out

SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))
ABOUT_FILES = re.compile(r"(readme|licen[sc]e|copying|notice|authors|changelog|changes)\b", re.IGNORECASE)
"""Beginnings of the names of files about the data."""

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
    """Files of another type that outnumber ``files``, for messages; "" if there are none.

    Files about the data (README.txt) and files that belong to one of another type by their name (00.txt to 00.png) are
    not counted.

    Args:
        files: the files of one type.
        found: all files.
        stronger: files of types to which ``files`` belong, not the reverse.
    """
    chosen, above = set(files), {file.stem for file in stronger}
    others = [file for file in found if file not in chosen and not ABOUT_FILES.match(file.name)]
    if not files or not others:
        return ""
    own = [file for file in files if file.stem not in above and not ABOUT_FILES.match(file.name)]
    names, kept = {file.stem for file in own}, set(stronger)
    groups: dict[str, list[Path]] = {}
    for file in others:
        if file in kept or file.stem not in names:
            suffix = file.suffix.lower()
            groups.setdefault("images" if suffix in SUFFIXES else suffix, []).append(file)
    more = [file for group in groups.values() if len(group) > len(own) for file in group]
    return describe_suffixes(more) if more else ""


def describe_suffixes(files: list[Path]) -> str:
    """How many files there are of each kind, for messages: "3 .jpg, 1 without a suffix"."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    return ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items())) or "no files"


class ImageFolder(Source):
    """Images directly in a folder (no classes), or in subfolders (each a class, in sorted order).

    Args:
        files: paths relative to the folder.
        table: their captions.

    Raises:
        ValueError: both, or subfolders named like splits.
    """

    options = frozenset(("image_size",))

    def __init__(self, config: DataConfig, folder: Path, files: list[Path], table: CaptionTable | None = None) -> None:
        self.config, self.folder, self.files, self.table = config, folder, files, table
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
        if self.class_names == ["inputs", "targets"]:
            self.kinds = ("pairs", "images", "domains")
        else:
            self.kinds = ("images", "domains") if len(self.class_names) == 2 else ("images",)

    def load(self, kind: str) -> Dataset:
        if kind == "pairs":
            return self._pairs()
        captions = self.table.captions(self.files) if kind == "images" and self.table else []
        images = dataclasses.replace(self._labelled(), captions=captions)
        return (image_dataset if kind == "images" else domain_dataset)(images, self.config.held_out)

    def _labelled(self) -> ImageStack:
        at_least(str(self.folder), len(self.files), "images")
        images = self._read(self.files)
        if len(self.class_names) < 2:
            return images
        number = {name: i for i, name in enumerate(self.class_names)}
        labels = torch.tensor([number[file.parts[0]] for file in self.files])
        return dataclasses.replace(images, labels=labels, class_names=self.class_names)

    def _pairs(self) -> Dataset:
        """Files in inputs/ and targets/ belong together that have equal names, but for the suffix."""
        inputs, targets = self._by_stem("inputs"), self._by_stem("targets")
        for stem in sorted(inputs.keys() ^ targets.keys()):
            place = "inputs" if stem in targets else "targets"
            raise ValueError(f"{self.folder}: expected an image {stem} in {place}{os.sep} too, got none")
        at_least(str(self.folder), len(inputs), "pairs")
        left, right = (self._read([side[stem] for stem in sorted(side)]) for side in (inputs, targets))
        if left.stack.shape[2] != right.stack.shape[2]:
            raise ValueError(
                f"{self.folder}: expected inputs and targets of one size, got {left.stack.shape[2]} and "
                f"{right.stack.shape[2]}: --image-size resizes and crops them"
            )
        return pair_dataset(left, right, *hold_out(len(inputs), self.config.held_out))

    def _read(self, files: list[Path]) -> ImageStack:
        name = str(self.folder)
        stack, contents = read_stack(name, ImageFiles([self.folder / file for file in files]), self.config.image_size)
        return ImageStack(name, stack, contents, *count_levels(stack))

    def _by_stem(self, side: str) -> dict[Path, Path]:
        """Name without side and suffix -> file."""
        found: dict[Path, Path] = {}
        for file in self.files:
            if file.parts[0] == side:
                stem = file.relative_to(side).with_suffix("")
                if stem in found:
                    raise ValueError(
                        f"{self.folder}: expected one image {side}{os.sep}{stem}, got {found[stem]}, {file}"
                    )
                found[stem] = file
        return found


def read_images(path: Path, image_size: int, channels: int) -> Tensor:
    """An image file, or all images below a folder, in the order of their names: (N, channels, S, S) uint8.

    Args:
        image_size: S; the shorter side is resized to it, the center cropped.
        channels: 1 (grey) or 3.

    Raises:
        FileNotFoundError: no such path. OSError: a file that can't be read. ValueError: no images, or one that can't be
            decoded.
    """
    if not path.is_dir():
        check_file(path, "an image or a folder of images")
    files = [path / file for file in with_suffix(files_below(path), SUFFIXES)] if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: expected images (.png, .jpg, ...) in it, got {describe_suffixes(files_below(path))}")
    every = torch.arange(len(files))
    return LazyImages(ImageFiles(files), every, channels, image_size, resize=True)[every]
