"""Folders and archives of images: classes, splits, pairs and captions, from the names of the files."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data._base import Dataset
from fastgen.data._files import FEW_COLUMNS, check_file, few
from fastgen.data.captions import read_captions
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import ImageSource, ImageStack, PairStacks, count_levels
from fastgen.data.images import SUFFIXES, ImageFiles, LazyImages, ReadImages, choose, header, read_stack
from fastgen.data.splitting import at_least
from fastgen.data.trees import Tree, TreeImages, files_below

ABOUT_FILES = re.compile(r"(readme|licen[sc]e|copying|notice|authors|changelog|changes)\b", re.IGNORECASE)
"""Beginnings of the names of files about the data."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
}
SPLIT_NAMES = {"test": "test", "val": "validation"}
DOMAIN_SPLIT = re.compile(r"(train|test|val)([AB])")
"""CycleGAN's folders: trainA, trainB, testA, testB."""


def with_suffix(files: Sequence[Path], suffixes: Set[str]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in suffixes]


def outnumbering(files: list[Path], found: Sequence[Path], stronger: list[Path]) -> str:
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


def describe_suffixes(files: Collection[Path]) -> str:
    """How many files there are of each kind, for messages: "3 .jpg, 1 without a suffix". Of many kinds the frequent
    ones."""
    counts = Counter(file.suffix.lower() or "without a suffix" for file in files)
    found = sorted(counts.items() if len(counts) <= FEW_COLUMNS else counts.most_common(FEW_COLUMNS))
    more = f", ... ({len(counts)} kinds)" if len(counts) > len(found) else ""
    return ", ".join(f"{n} {suffix}" for suffix, n in found) + more or "no files"


def image_folder(config: DataConfig, tree: Tree, files: Sequence[Path]) -> ImageFolder:
    """The images of a tree. Folders train/ and test/ (or val/) in it are the training and the held-out split.

    Raises:
        ValueError: images both in it and in subfolders, subfolders named like splits without train/, or a table of
            captions that does not fit.
    """
    splits = _splits(tree.name, files)
    table = read_captions(tree)
    captions = table.captions(files) if table else {}
    used = {table.file} if table else set()
    if not splits:
        _refuse_misplaced_splits(tree.name, files)
        return ImageFolder(config, tree, {file: file for file in files}, captions, used=used)
    folders: dict[str, ImageFolder] = {}
    notes: list[str] = []
    for split, members in splits.items():
        inside = {folder: read_captions(tree, Path(folder)) for folder in {file.parts[0] for file in members.values()}}
        own = {file: captions[file] for file in members.values() if file in captions}
        for folder, found in inside.items():
            if found and not table:
                own |= found.captions([file for file in members.values() if file.parts[0] == folder])
                used = used | {found.file}
        folders[split] = ImageFolder(config, tree, members, own, used=used, split=split)
    train = folders["train"]
    test = folders.get("test", folders.get("val"))
    if config.test_data:
        chosen = os.path.realpath(config.test_data)
        for split in sorted({*splits} - {"train"}):
            inside_of = {file.parts[0] for file in splits[split].values()}
            if chosen not in {os.path.realpath(tree.place(Path(folder))) for folder in inside_of}:
                notes.append(
                    f"{len(splits[split]):,} images of the {SPLIT_NAMES[split]} split were left out: "
                    "--test-data is held out"
                )
    elif "test" in folders and "val" in folders:
        notes.append(
            f"{len(splits['val']):,} images of the validation split were left out: the test split is held out "
            "(--test-data chooses another)"
        )
    train.notes, train.test = tuple(notes), test
    train.used = used | {file for members in splits.values() for file in members.values()}
    if test is not None:
        train.kinds = tuple(kind for kind in train.kinds if kind in test.kinds)
    return train


def _split_of(folder: str) -> str:
    """The split that a folder is named like; "" for another name."""
    match = DOMAIN_SPLIT.fullmatch(folder)
    return match[1] if match else SPLITS.get(folder.lower(), "")


def _refuse_misplaced_splits(name: str, files: Sequence[Path]) -> None:
    """Raises ValueError where held-out images would be trained on: splits without train/, beside other folders, or
    below the classes."""
    names = {file.parts[0] for file in files if len(file.parts) > 1}
    kinds = {*map(_split_of, names)}
    if len(names) > 1 and ("" not in kinds or (len(kinds) > 2 and "train" in kinds)):
        raise ValueError(
            f"{name}: expected subfolders that are classes, or train{os.sep} and test{os.sep} or val{os.sep}, got "
            f"{few(sorted(names))}: give one of them"
        )
    below = {file.parts[1] for file in files if len(file.parts) > 2}
    inside = {*map(_split_of, below)}
    if len(inside) > 1 and "" not in inside and all(len(file.parts) > 2 for file in files):
        raise ValueError(
            f"{name}: expected train{os.sep} and test{os.sep} or val{os.sep} above the classes, got "
            f"{few(sorted(below))} below {few(sorted(names))}"
        )


def _splits(name: str, files: Sequence[Path]) -> dict[str, dict[Path, Path]]:
    """Split -> {path below the split's folder: file}; {} where the folders are no splits.

    Raises:
        ValueError: a file that two folders of one split have, such as val/0.png and valid/0.png.
    """
    found: dict[str, dict[Path, Path]] = {}
    for file in files:
        if len(file.parts) == 1:
            return {}
        split, below = _split_of(file.parts[0]), Path(*file.parts[1:])
        if match := DOMAIN_SPLIT.fullmatch(file.parts[0]):
            below = Path(match[2]) / below
        if not split:
            return {}
        other = found.setdefault(split, {}).setdefault(below, file)
        if other != file:
            raise ValueError(f"{name}: expected one folder of the split {split}, got {other} and {file}")
    return found if "train" in found else {}


def file_splits(name: str, files: Sequence[Path]) -> dict[str, dict[Path, Path]]:
    """Texts or recordings by split: "train", and "test" for those held out, below test/ or else val/.

    Returns:
        Split -> {path below the split's folder: file}.

    Raises:
        ValueError: folders that would mix the splits.
    """
    splits = _splits(name, files)
    if not splits:
        _refuse_misplaced_splits(name, files)
        return {"train": {file: file for file in files}}
    held = splits.get("test", splits.get("val", {}))
    return {"train": splits["train"]} | ({"test": held} if held else {})


class ImageFolder(ImageSource):
    """Images directly in a folder (no classes), or in subfolders (each a class, in sorted order).

    Two subfolders whose images have the same names are pairs, and so are images that are twice as wide as high.

    Args:
        tree: the files.
        files: path below the folder of this split -> path in the tree.
        captions: by path in the tree; {} without captions.
        used: files beside the images that belong to the data.

    Raises:
        ValueError: images both directly in the folder and in subfolders.
    """

    def __init__(
        self,
        config: DataConfig,
        tree: Tree,
        files: Mapping[Path, Path],
        captions: Mapping[Path, str],
        used: Collection[Path] = (),
        split: str = "",
    ) -> None:
        self.config, self.tree, self.files, self.captions = config, tree, files, captions
        self.name = tree.place(Path(split)) if split else tree.name
        self.used = {*used, *files.values()}
        self.unpaired: list[Path] = []
        nearly = False
        self.class_names = sorted({file.parts[0] for file in files if len(file.parts) > 1})
        direct = [file for file in files if len(file.parts) == 1]
        if direct and self.class_names:
            raise ValueError(
                f"{self.name}: expected images directly inside or in subfolders, one for each class, "
                f"got both ({direct[0]} and {self.class_names[0]}{os.sep})"
            )
        self.side_by_side = not self.class_names and self._is_side_by_side()
        if self.side_by_side:
            self.kinds = ("pairs", "images")
        elif self.class_names == ["inputs", "targets"]:
            self.kinds = ("pairs", "images", "domains")
        elif len(self.class_names) == 2:
            self.unpaired = self._unpaired()
            nearly = self._is_nearly_paired()
            paired = not self.unpaired or (nearly and config.skip_broken)
            self.kinds = ("images", "domains", "pairs") if paired else ("images", "domains")
        else:
            self.kinds = ("images",)
        self.options = frozenset(("image_size", "binarize", "skip_broken", "test_data"))
        self.options |= {"direction"} if nearly or "pairs" in self.kinds else set()

    def obstacle(self, kind: str) -> str:
        for each in (self, self.test):
            if kind == "pairs" and isinstance(each, ImageFolder) and each.unpaired and each._is_nearly_paired():
                return each._without_counterpart()
        return ""

    def load(self, kind: str) -> Dataset:
        data = super().load(kind)
        return dataclasses.replace(data, warnings=(*self.notes, *data.warnings))

    def read(self, like: ImageStack | None = None) -> ImageStack:
        names = list(self.files)
        if like is None:
            at_least(self.name, len(names), "images")
        images = self._read([self.files[name] for name in names], channels=like.stack.shape[1] if like else 0)
        names = [names[i] for i in images.kept]
        stack = self._stack(images)
        if self.captions:
            stack = dataclasses.replace(stack, captions=[self.captions[self.files[name]] for name in names])
        classes = list(like.class_names) if like else self.class_names
        if len(classes) < 2:
            return stack
        if unknown := sorted({*self.class_names} - {*classes}):
            raise ValueError(
                f"{self.name}: expected classes of the training images ({few(classes)}), got {few(unknown)}"
            )
        number = {name: i for i, name in enumerate(classes)}
        if not self.class_names:
            raise ValueError(f"{self.name}: expected a subfolder for each class, as for training, got none")
        labels = torch.tensor([number[name.parts[0]] for name in names])
        return dataclasses.replace(stack, labels=labels, class_names=classes)

    def read_pairs(self, like: PairStacks | None = None) -> PairStacks:
        depths = [side.stack.shape[1] for side in like] if like else [0, 0]
        left_out = ""
        if self.side_by_side:
            files = list(self.files.values())
            both = [self._read(files, depth, half) for half, depth in zip((0, 1), depths, strict=True)]
        else:
            sides = [self._stems(name) for name in self.class_names]
            unpaired = self._unpaired()
            if unpaired and not self.config.skip_broken:
                raise ValueError(self._without_counterpart())
            if unpaired:
                left_out = f"{len(unpaired):,} images without a counterpart were left out: {few(unpaired)}"
            stems = sorted(sides[0].keys() & sides[1].keys())
            both = [
                self._read([self.files[side[stem]] for stem in stems], depth)
                for side, depth in zip(sides, depths, strict=True)
            ]
        if like is None:
            at_least(self.name, len(both[0].kept), "pairs")
        stacks = [self._stack(_only(side, other.kept)) for side, other in zip(both, both[::-1], strict=True)]
        if left_out:
            stacks[0] = dataclasses.replace(stacks[0], notes=(left_out, *stacks[0].notes))
        if stacks[0].stack.shape[2] != stacks[1].stack.shape[2]:
            raise ValueError(
                f"{self.name}: expected inputs and targets of one size, got {stacks[0].stack.shape[2]} and "
                f"{stacks[1].stack.shape[2]}: --image-size resizes and crops them"
            )
        return PairStacks(*stacks)

    def _read(self, files: list[Path], channels: int = 0, half: int | None = None) -> ReadImages:
        images = TreeImages(self.tree, files, half)
        size, skip = self.config.image_size, self.config.skip_broken
        return read_stack(self.name, images, size, skip_broken=skip, channels=channels)

    def _stack(self, images: ReadImages) -> ImageStack:
        levels = count_levels(images.stack)
        return ImageStack(self.tree.name, images.stack, images.contents, *levels, notes=images.notes)

    def _stems(self, side: str, unique: bool = True) -> dict[Path, Path]:
        """Name without side and suffix -> path below the folder. unique: two images of one name are an error."""
        found: dict[Path, Path] = {}
        for file in self.files:
            if file.parts[0] == side:
                stem = file.relative_to(side).with_suffix("")
                other = found.setdefault(stem, file)
                if other != file and unique:
                    raise ValueError(f"{self.name}: expected one image {side}{os.sep}{stem}, got {other}, {file}")
        return found

    def _unpaired(self) -> list[Path]:
        """The images of each of two subfolders that have no counterpart in the other."""
        sides = [self._stems(name, unique=False) for name in self.class_names]
        return [
            own[stem]
            for own, other in zip(sides, sides[::-1], strict=True)
            for stem in sorted(own.keys() - other.keys())
        ]

    def _is_nearly_paired(self) -> bool:
        """Whether more than half of the names are in both subfolders."""
        sides = [self._stems(name, unique=False).keys() for name in self.class_names]
        return 2 * len(sides[0] & sides[1]) > len(sides[0] | sides[1])

    def _without_counterpart(self) -> str:
        """The message that names images without a counterpart."""
        a, b = self.class_names
        sides: dict[str, list[Path]] = {a: [], b: []}
        for file in self._unpaired():
            sides[b if file.parts[0] == a else a].append(file.relative_to(file.parts[0]).with_suffix(""))
        missing = [
            f"{'an image' if len(stems) == 1 else 'images'} {few(stems)} in {side}{os.sep}"
            for side, stems in sides.items()
            if stems
        ]
        return (
            f"{self.name}: expected {' and '.join(missing)} too, got none: --skip-broken leaves out images without a "
            "counterpart"
        )

    def _is_side_by_side(self) -> bool:
        """Whether the first image is twice as wide as high; the others are checked where pairs are read."""
        first = next(iter(self.files.values()), None)
        try:
            found = header(self.tree.read(first), "") if first else None
        except (OSError, ValueError):
            return False  # reading the images says so
        return found is not None and found.width == 2 * found.height


def _only(side: ReadImages, kept: list[int]) -> ReadImages:
    """The images of one side whose counterparts were read, too."""
    if side.kept == kept:
        return side
    both = {*kept}
    places = [place for place, i in enumerate(side.kept) if i in both]
    contents = b"".join(side.contents[32 * place : 32 * place + 32] for place in places)
    stack = choose(side.stack, torch.tensor(places))
    return ReadImages(stack, contents, [side.kept[place] for place in places], side.notes)


def image_paths(path: Path) -> list[Path]:
    """The file itself, or the image files below a folder, in the order of their names.

    Raises:
        FileNotFoundError: no such path. ValueError: no images in the folder.
    """
    if not path.is_dir():
        check_file(path, "an image or a folder of images")
        return [path]
    below = files_below(path)
    if files := [path / file for file in with_suffix(below, SUFFIXES)]:
        return files
    raise ValueError(f"{path}: expected images (.png, .jpg, ...) in it, got {describe_suffixes(below)}")


def read_images(path: Path, image_size: int, channels: int) -> Tensor:
    """An image file, or all images below a folder, in the order of their names: (N, channels, S, S) uint8.

    Args:
        image_size: S; the shorter side is resized to it, the center cropped.
        channels: 1 (grayscale) or 3.

    Raises:
        FileNotFoundError: no such path. OSError: a file that can't be read. ValueError: no images, one that can't be
            decoded, or a size or number of channels out of range.
    """
    if image_size < 1:
        raise ValueError(f"image_size: expected 1 or more, got {image_size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    files = image_paths(path)
    every = torch.arange(len(files))
    return LazyImages(ImageFiles(files), every, channels, image_size, resize=True)[every]
