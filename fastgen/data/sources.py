"""From a source string to a dataset: ``open_source`` finds the source, its ``load`` reads the dataset.

A source is a bundled dataset, a file, a folder, or a Hugging Face dataset: one class each, in the module of its data.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from fastgen.data import hub
from fastgen.data._base import Dataset, Source
from fastgen.data._files import check_file
from fastgen.data.arrays import IDX_NAME, ImageArrays, read_idx, read_npz
from fastgen.data.audio import Recordings
from fastgen.data.bundled import BUNDLED, SOURCES, BundledSource
from fastgen.data.captions import read_captions
from fastgen.data.config import DataConfig
from fastgen.data.folders import ImageFolder, describe_suffixes, files_below, outnumbering, with_suffix
from fastgen.data.images import SUFFIXES
from fastgen.data.sequences import PairsFile
from fastgen.data.text import TextFiles

EXAMPLES = {
    "images": "digits, textures, photos, a folder of images, .npz, IDX, hf:NAME, ...",
    "pairs": "photos, a folder with inputs/ and targets/",
    "domains": "textures, a folder with two subfolders of images, images of two classes",
    "text": "prose, a .txt file, a folder of them, hf:NAME, ...",
    "sequences": "reversal, sums, a .tsv file",
    "audio": "tones, a .wav file, a folder of them",
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
    expected = " or ".join(f"{kind} ({EXAMPLES[kind]})" for kind in kinds)
    raise ValueError(f"{config.source}: expected data of kind {expected}, got {' or '.join(source.kinds)}")


def open_source(config: DataConfig) -> Source:
    """The source that the config names. Errors are those of ``load_data``."""
    source = _find(config)
    config.refuse_unused(source.options)
    return source


def _find(config: DataConfig) -> Source:
    name = bundled_name(config.source)
    if name is not None:
        return BundledSource(dataclasses.replace(config, source=name))
    if config.source.startswith(hub.PREFIX):
        return hub.Table(config)
    path = Path(config.source)
    if os.path.isdir(path):
        return hub.Table(config) if hub.is_saved(path) else Folder(config, path)
    check_file(path, f"{', '.join(SOURCES)}, {hub.PREFIX}NAME or a path")
    suffix = path.suffix.lower()
    if IDX_NAME.search(path.name):
        return ImageArrays(config, read_idx(path, config.image_size))
    if suffix == ".npz":
        return ImageArrays(config, read_npz(path, config.image_size, config.column), options=("column",))
    if suffix == ".txt":
        return TextFiles(config, [path])
    if suffix == ".tsv":
        return PairsFile(config, path)
    if suffix == ".wav":
        return Recordings(config, [path])
    if suffix == ".parquet":
        return hub.Table(config)
    if suffix in SUFFIXES:
        raise ValueError(f"{path}: expected a folder of images, got one file")
    raise ValueError(
        f"{path}: expected a folder or an .npz, IDX, .txt, .tsv, .wav or .parquet file, got {suffix or 'no suffix'}"
    )


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


class Folder(Source):
    """Files below a folder: images, texts, recordings, whichever are there; all others are left out.

    Raises:
        ValueError: no such files, or files of other types outnumber them.
    """

    def __init__(self, config: DataConfig, path: Path) -> None:
        self.found = files_below(path)
        images, texts, waves = (with_suffix(self.found, suffixes) for suffixes in (SUFFIXES, {".txt"}, {".wav"}))
        refused = {
            kind: f"{len(files)} {kind} files beside {others}"
            for kind, files, stronger in (("image", images, []), ("text", texts, images + waves), ("audio", waves, []))
            if (others := outnumbering(files, self.found, stronger))
        }
        self.sources: dict[str, Source] = {}
        self.used: dict[str, list[Path]] = {}
        if images and "image" not in refused:
            table = read_captions(path, self.found)
            folder = ImageFolder(config, path, images, table)
            self.sources |= dict.fromkeys(folder.kinds, folder)
            self.used |= dict.fromkeys(folder.kinds, images + ([table.file] if table else []))
        if texts and "text" not in refused:
            self.sources["text"] = TextFiles(config, [path / file for file in texts])
            self.used["text"] = texts
        if waves and "audio" not in refused:
            self.sources["audio"] = Recordings(config, [path / file for file in waves])
            self.used["audio"] = waves
        if not self.sources:
            expected, got = "images (.png, .jpg, ...), .txt or .wav files in it", describe_suffixes(self.found)
            if refused:
                expected = f"a folder of {expected.removesuffix(' in it')}, or one file"
                got = "; ".join(refused.values())
            raise ValueError(f"{path}: expected {expected}, got {got}")
        self.kinds = tuple(self.sources)
        self.options = frozenset().union(*(source.options for source in self.sources.values()))

    def load(self, kind: str) -> Dataset:
        data = self.sources[kind].load(kind)
        unused = sorted(set(self.found) - set(self.used[kind]))
        if not unused:
            return data
        note = f"files of other types were left out: {describe_suffixes(unused)}"
        return dataclasses.replace(data, warnings=(note,))
