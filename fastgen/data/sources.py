"""From a source string to a dataset: ``open_source`` finds the source, its ``load`` reads the dataset.

A source is a bundled dataset, a file, a folder, or a Hugging Face dataset: one class each, in the module of its data.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence, Set
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data import folders, hub
from fastgen.data._base import Dataset, Source
from fastgen.data._files import check_file
from fastgen.data.arrays import (
    CIFAR_PICKLES,
    IDX_NAME,
    ImageArrays,
    cifar_files,
    idx_files,
    label_names,
    mapping_beside,
    open_cifar,
    open_idx,
    read_idx,
    read_npy,
    read_npz,
)
from fastgen.data.audio import SOUND_SUFFIXES, Recordings
from fastgen.data.bundled import BUNDLED, SOURCES, BundledSource
from fastgen.data.config import DataConfig
from fastgen.data.folders import describe_suffixes, file_splits, image_folder, outnumbering, with_suffix
from fastgen.data.image_sets import ImageSource, ImageStack
from fastgen.data.images import SUFFIXES
from fastgen.data.json_lines import JsonLines
from fastgen.data.sequences import PairsFile
from fastgen.data.text import TextFiles
from fastgen.data.trees import FolderTree, Tree, archive_tree, files_below, folder_tree, is_archive

EXAMPLES = {
    "images": "digits, textures, photos, a folder or archive of images, .npz, IDX, CIFAR, hf:NAME, ...",
    "pairs": "photos, a folder with inputs/ and targets/, two folders with the same names, images side by side",
    "domains": "textures, a folder with two subfolders of images, images of two classes",
    "text": "prose, a .txt file, a folder of them, .jsonl, hf:NAME, ...",
    "sequences": "reversal, sums, a .tsv or .jsonl file",
    "audio": "tones, a .wav or .flac file, a folder of them",
}
"""Examples of sources for each kind."""


def load_data(config: DataConfig, *kinds: str) -> Dataset:
    """The dataset, of the first of ``kinds`` (of ``fastgen.batch.KINDS``) that the source can serve.

    Raises:
        ValueError: another kind of data, a file that is not what it should be, an option out of range.
        TypeError: an array of another dtype. FileNotFoundError: no such file.
        ImportError: a package of the extras is missing. Each in one line that names the file or the argument.
    """
    for kind in kinds:
        if kind not in EXAMPLES:
            raise ValueError(f"kind: expected one of {', '.join(EXAMPLES)}, got {kind!r}")
    source = open_source(config)
    return source.load(choose_kind(config, source, *kinds))


def choose_kind(config: DataConfig, source: Source, *kinds: str) -> str:
    """The first of ``kinds`` that the source can serve. ValueError if there is none."""
    for kind in kinds:
        if kind in source.kinds:
            return kind
    if obstacle := next(filter(None, map(source.obstacle, kinds)), ""):
        raise ValueError(obstacle)
    expected = " or ".join(f"{kind} ({EXAMPLES[kind]})" for kind in kinds)
    raise ValueError(f"{config.source}: expected data of kind {expected}, got {' or '.join(source.kinds)}")


def open_source(config: DataConfig) -> Source:
    """The source that the config names, with that of ``test_data``. Errors are those of ``load_data``."""
    source = _find(config)
    config.refuse_unused(source.options)
    if config.test_data:
        _hold_out(source, config)
    return source


def read_images(path: Path, image_size: int, channels: int) -> Tensor:
    """Images of any source: (N, channels, S, S) uint8. An image file or a folder of images as by ``folders``, in the
    order of their names; else those of arrays, IDX or CIFAR files or an archive, without their test split.

    Args, errors: as of ``folders.read_images``; also ValueError for colors where ``channels`` is 1.
    """
    folder = path.is_dir()
    if not path.exists() or path.suffix.lower() in SUFFIXES or (folder and with_suffix(files_below(path), SUFFIXES)):
        return folders.read_images(path, image_size, channels)
    try:
        source = _find(DataConfig(str(path), image_size=image_size))
    except ValueError:
        if not folder and not _holds_images(path):
            return folders.read_images(path, image_size, channels)  # an image whose name does not say so
        raise
    images = next((each for each in _sources(source) if isinstance(each, ImageSource)), None)
    if images is None:
        raise ValueError(f"{path}: expected images, got {source.kinds[0]}")
    found = images.read()
    stack = found.stack[torch.arange(len(found.stack))]
    if stack.shape[1] > channels:
        raise ValueError(f"{path}: expected gray images, as those of the training, got images in color")
    pixels = (stack.float() * (255 / found.scale)).round().to(torch.uint8)
    return pixels.expand(-1, channels, -1, -1).contiguous()


def _holds_images(path: Path) -> bool:
    """Whether the name is that of a file of many images."""
    return bool(IDX_NAME.search(path.name)) or is_archive(path.name) or path.suffix.lower() in (".npz", ".npy", ".bin")


def _hold_out(source: Source, config: DataConfig) -> None:
    """Opens ``config.test_data`` as the held-out split of a source."""
    test = _find(dataclasses.replace(config, source=config.test_data, test_data=""))
    found = False
    for ours in _sources(source):
        for theirs in _sources(test):
            for base in (ImageSource, TextFiles, Recordings):
                if isinstance(ours, base) and isinstance(theirs, base):
                    if theirs.test is not None:
                        raise ValueError(f"{config.test_data}: test_data: expected one split, got data that have two")
                    if config.held_out:
                        raise ValueError(f"held_out: expected 0, as test_data is held out, got {config.held_out}")
                    ours.test, found = theirs, True
    if not found:
        raise ValueError(f"{config.test_data}: test_data: expected {source.kinds[0]}, got {test.kinds[0]}")


def _sources(source: Source) -> list[Source]:
    """The sources of a folder, one of images, one of text and one of recordings; else the source itself."""
    return list(dict.fromkeys(source.sources.values())) if isinstance(source, Folder) else [source]


def _find(config: DataConfig) -> Source:
    name = bundled_name(config.source)
    if name is not None:
        return BundledSource(dataclasses.replace(config, source=name))
    if config.source.startswith(hub.PREFIX):
        return hub.Table(config)
    path = Path(config.source)
    if os.path.isdir(path):
        return hub.Table(config) if hub.is_saved(path) else open_folder(config, folder_tree(path))
    check_file(path, f"{', '.join(SOURCES)}, {hub.PREFIX}NAME or a path")
    suffix = path.suffix.lower()
    beside = FolderTree(config.source, path.parent, [Path(path.name), *map(Path, _names_beside(path))])
    if IDX_NAME.search(path.name):
        names = label_names(beside, mapping_beside(beside, Path(path.name)))
        return ImageArrays(config, read_idx(beside, Path(path.name), config.image_size), label_names=names)
    if is_archive(path.name):
        return open_folder(config, archive_tree(path))
    if suffix == ".bin":
        found = cifar_files(FolderTree(config.source, path.parent, [Path(path.name)]))
        if found:
            return open_cifar(config, beside, found)
    if suffix == ".npz":
        return ImageArrays(config, *read_npz(path, config.image_size, config.column), options=("column",))
    if suffix == ".npy":
        return ImageArrays(config, *read_npy(path, config.image_size))
    if suffix == ".txt":
        return TextFiles(config, [path])
    if suffix == ".tsv":
        return PairsFile(config, path)
    if suffix == ".jsonl":
        return JsonLines(config, path)
    if suffix in SOUND_SUFFIXES:
        return Recordings(config, {Path(path.name): path})
    if suffix == ".parquet":
        return hub.Table(config)
    if suffix in SUFFIXES:
        raise ValueError(f"{path}: expected a folder of images, got one file")
    if path.name in CIFAR_PICKLES or suffix in (".pkl", ".pickle", ".pt", ".pth"):
        raise ValueError(
            f"{path}: expected data that can be read without running code, got a pickle: CIFAR has a binary version, "
            "arrays can be saved as .npz"
        )
    raise ValueError(
        f"{path}: expected a folder, an archive (.zip, .tar), or an .npz, .npy, IDX, .txt, .tsv, .jsonl, .wav, "
        f".flac or .parquet file, got {suffix or 'no suffix'}"
    )


def _names_beside(path: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(path.parent) if name != path.name)
    except OSError:
        return []


def bundled_name(source: str) -> str | None:
    """The bundled dataset that a source names, alone or after ``BUNDLED``; None for any other source.

    "photos/" and "./photos" are paths. "photos" is the bundled dataset, unless the current folder has an entry of that
    name.

    Raises:
        ValueError: an ambiguous name, or no bundled dataset after ``BUNDLED``.
    """
    if source.startswith(BUNDLED):
        name = source.removeprefix(BUNDLED)
        if name not in SOURCES:
            raise ValueError(f"{source}: expected one of {', '.join(SOURCES)} after {BUNDLED}, got {name!r}")
        return name
    if source not in SOURCES:
        return None
    if os.path.lexists(source):
        raise ValueError(
            f"{source}: expected {BUNDLED}{source} (the bundled dataset) or .{os.sep}{source} (the path), "
            f"got a name that both have"
        )
    return source


def open_folder(config: DataConfig, tree: Tree) -> Source:
    """Files below a folder or in an archive: MNIST's four, CIFAR's binary version, Parquet, or what ``Folder`` takes.

    Raises:
        ValueError: no such files, files of other types outnumber them, or CIFAR's pickles.
    """
    idx = idx_files(tree)
    if idx:
        return Arrays(tree, open_idx(config, tree, idx))
    cifar = cifar_files(tree)
    if cifar:
        return Arrays(tree, open_cifar(config, tree, cifar))
    shards = with_suffix(tree.files, {".parquet"})
    if shards and isinstance(tree, FolderTree) and not with_suffix(tree.files, SUFFIXES):
        return hub.Table(config, [tree.path / file for file in shards])
    return Folder(config, tree)


class Folder(Source):
    """Files below a folder: images, texts, recordings, whichever are there; all others are left out. Of an archive only
    images are read.

    Raises:
        ValueError: no such files, or files of other types outnumber them.
    """

    def __init__(self, config: DataConfig, tree: Tree) -> None:
        self.found = tree.files
        suffixes = (SUFFIXES, {".txt"}, SOUND_SUFFIXES)
        images, texts, waves = (with_suffix(self.found, each) for each in suffixes)
        path = tree.path if isinstance(tree, FolderTree) else None
        if path is None:
            texts, waves = [], []
        refused = {
            kind: f"{len(files)} {kind} files beside {others}"
            for kind, files, stronger in (("image", images, []), ("text", texts, images + waves), ("audio", waves, []))
            if (others := outnumbering(files, self.found, stronger))
        }
        self.sources: dict[str, Source] = {}
        self.used: dict[str, Set[Path]] = {}
        if images and "image" not in refused:
            folder = image_folder(config, tree, images)
            self.sources |= dict.fromkeys(folder.kinds, folder)
            self.used |= dict.fromkeys(folder.kinds, folder.used)
        if path and texts and "text" not in refused:
            splits = file_splits(tree.name, texts)
            read = {
                split: TextFiles(config, [path / file for file in files.values()]) for split, files in splits.items()
            }
            self.sources["text"] = read["train"]
            read["train"].test = read.get("test")
            self.used["text"] = {file for files in splits.values() for file in files.values()}
        if path and waves and "audio" not in refused:
            splits = file_splits(tree.name, waves)
            recordings = {
                split: Recordings(config, {below: path / file for below, file in files.items()})
                for split, files in splits.items()
            }
            self.sources["audio"] = recordings["train"]
            recordings["train"].test = recordings.get("test")
            self.used["audio"] = {file for files in splits.values() for file in files.values()}
        if not self.sources:
            expected = (
                "images (.png, .jpg, ...), .txt, .wav or .flac files in it" if path else "images (.png, .jpg, ...)"
            )
            got = describe_suffixes(self.found)
            if refused:
                expected = f"a folder of {expected.removesuffix(' in it')}, or one file"
                got = "; ".join(refused.values())
            raise ValueError(f"{tree.name}: expected {expected}, got {got}")
        self.kinds = tuple(self.sources)
        self.options = frozenset().union(*(source.options for source in self.sources.values()))

    def obstacle(self, kind: str) -> str:
        return next(filter(None, (source.obstacle(kind) for source in self.sources.values())), "")

    def load(self, kind: str) -> Dataset:
        return _with_note(self.sources[kind].load(kind), self.found, self.used[kind])


class Arrays(ImageSource):
    """Images in arrays among the files of a folder or an archive."""

    def __init__(self, tree: Tree, arrays: ImageArrays) -> None:
        self.config, self.tree, self.arrays = arrays.config, tree, arrays
        self.kinds, self.options, self.test, self.used = arrays.kinds, arrays.options, arrays.test, arrays.used

    def read(self, like: ImageStack | None = None) -> ImageStack:
        return self.arrays.read(like)

    def load(self, kind: str) -> Dataset:
        gzipped = {file.with_name(file.name + ".gz") for file in self.used}
        return _with_note(super().load(kind), self.tree.files, {*self.used, *gzipped})


def _with_note(data: Dataset, found: Sequence[Path], used: Set[Path]) -> Dataset:
    unused = [file for file in found if file not in used]
    if not unused:
        return data
    note = f"files of other types were left out: {describe_suffixes(unused)}"
    return dataclasses.replace(data, warnings=(note, *data.warnings))
