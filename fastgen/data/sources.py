"""From what a person wrote to a data set: the box's names, files, folders, Hugging Face."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeAlias

from fastgen.data import arrays, audio, box, folders, hub, sequences, text
from fastgen.data._base import Dataset
from fastgen.data._files import check_file
from fastgen.data.captions import find_captions
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import Pictures, domain_dataset, image_dataset
from fastgen.data.pictures import SUFFIXES

SOURCES: Mapping[str, str] = {
    "digits": "images: 1797 handwritten digits, 8x8, grey, 10 classes (scikit-learn)",
    "textures": "domains, images: patches of grass and gravel, grey (scikit-image)",
    "photos": "images, pairs (grey to colour): patches of two photographs (scikit-learn)",
    "prose": "text: the documentation of Python's language (standard library)",
    "reversal": "sequences: random strings, backwards",
    "sums": 'sequences: "12+345" to "357"',
    "tones": "audio: plucked and blown tones, 8000 samples a second",
}
"""The bundled data sets: kinds and contents."""

SERVES: Mapping[str, str] = {
    "images": "digits, textures, photos, a folder of images, .npz, IDX, hf:NAME, ...",
    "pairs": "photos, a folder with inputs/ and targets/",
    "domains": "textures, a folder with two subfolders of images, images of two classes",
    "text": "prose, a .txt file, a folder of them, hf:NAME, ...",
    "sequences": "reversal, sums, a .tsv file",
    "audio": "tones, a .wav file, a folder of them",
}
"""Kinds, and examples of what has them."""

BUNDLED = "bundled:"
"""Before the name of a bundled data set, where a file or folder has the same name."""

Makers: TypeAlias = dict[str, Callable[[], Dataset]]
"""What a source can serve, the first kind being what it is."""

PATCHES = frozenset(("image_size", "items"))
IMAGES = frozenset(("image_size",))
ITEMS = frozenset(("items",))
TEXT = frozenset(("tokens",))
AUDIO = frozenset(("seconds",))
COLUMN = frozenset(("column",))
NONE: frozenset[str] = frozenset()


def load_data(config: DataConfig, *kinds: str) -> Dataset:
    """The data set, as batches of the first of ``kinds`` (of ``fastgen.models.KINDS``) that it can serve.

    Raises:
        ValueError: another kind of data, a file that is not what it should be, an option out of range.
        TypeError: an array of another dtype. FileNotFoundError: nothing there.
        ImportError: a package of the extras is missing. Each in one line that names the file or the argument.
    """
    for kind in kinds:
        if kind not in SERVES:
            raise ValueError(f"kind: expected one of {', '.join(SERVES)}, got {kind!r}")
    makers = find(config)
    for kind in kinds:
        if kind in makers:
            return makers[kind]()
    expected, got = (" or ".join(texts) for texts in ([f"{kind} ({SERVES[kind]})" for kind in kinds], makers))
    raise ValueError(f"{config.source}: expected data of kind {expected}, got {got}")


def find(config: DataConfig) -> Makers:
    """What the source can serve."""
    name = bundled(config.source)
    if name is not None:
        return _in_the_box(dataclasses.replace(config, source=name))
    if config.source.startswith(hub.PREFIX):
        return _table(config)
    path = Path(config.source)
    if not os.path.isdir(path):
        check_file(path, f"{', '.join(SOURCES)}, {hub.PREFIX}NAME or a path")
        return _in_file(config, path)
    return _in_folder(config, path)


def bundled(source: str) -> str | None:
    """The bundled set that a source names, alone or after ``BUNDLED``; None for any other source.

    "photos/" and "./photos" are paths. "photos" is the bundled set, unless something of that name lies in the
    current folder.

    Raises:
        ValueError: a name that is both, or a set that is not bundled.
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
            f"{source}: expected {BUNDLED}{source} (the bundled set) or .{os.sep}{source} (the path), "
            f"got a name that both have"
        )
    return source


def _in_the_box(c: DataConfig) -> Makers:
    used, makers = {
        "digits": (IMAGES, {"images": lambda: box.digits(c.image_size, c.held_out)}),
        "textures": (
            PATCHES,
            {
                "domains": lambda: box.texture_domains(c.image_size, c.items, c.held_out),
                "images": lambda: box.texture_images(c.image_size, c.items, c.held_out),
            },
        ),
        "photos": (
            PATCHES,
            {
                "images": lambda: box.photo_images(c.image_size, c.items, c.held_out),
                "pairs": lambda: box.photo_pairs(c.image_size, c.items, c.held_out),
            },
        ),
        "prose": (TEXT, {"text": lambda: text.text_dataset("prose", text.prose(), c.held_out, c.tokens)}),
        "reversal": (ITEMS, {"sequences": lambda: sequences.reversal(c.items, c.held_out)}),
        "sums": (ITEMS, {"sequences": lambda: sequences.sums(c.items, c.held_out)}),
        "tones": (ITEMS | AUDIO, {"audio": lambda: audio.tones(c.items, c.held_out, c.seconds)}),
    }[c.source]
    c.refuse_unused(used)
    return makers


def _in_file(c: DataConfig, path: Path) -> Makers:
    suffix = path.suffix.lower()
    if arrays.IDX_NAME.search(path.name):
        c.refuse_unused(IMAGES)
        return _arrays(c, arrays.read_idx(path, c.image_size))
    if suffix == ".npz":
        c.refuse_unused(IMAGES | COLUMN)
        return _arrays(c, arrays.read_npz(path, c.image_size, c.column))
    if suffix == ".txt":
        c.refuse_unused(TEXT)
        return {"text": lambda: text.text_dataset(c.source, text.read_text(path), c.held_out, c.tokens)}
    if suffix == ".tsv":
        c.refuse_unused(NONE)
        return {"sequences": lambda: sequences.read_tsv(path, c.held_out)}
    if suffix == ".wav":
        c.refuse_unused(AUDIO)
        return {"audio": lambda: audio.read_wavs(c.source, [path], c.seconds, c.held_out)}
    if suffix == ".parquet":
        return _table(c)
    if suffix in SUFFIXES:
        raise ValueError(f"{path}: expected a folder of images, got one file")
    raise ValueError(
        f"{path}: expected a folder or an .npz, IDX, .txt, .tsv, .wav or .parquet file, got {suffix or 'no suffix'}"
    )


def _arrays(c: DataConfig, pictures: Pictures) -> Makers:
    makers: Makers = {"images": lambda: image_dataset(pictures, c.held_out)}
    if pictures.labels is not None and pictures.labels.unique().tolist() == [0, 1]:
        makers["domains"] = lambda: domain_dataset(pictures, c.held_out)
    return makers


def _in_folder(c: DataConfig, path: Path) -> Makers:
    if hub.is_saved(path):
        return _table(c)
    found = folders.files_below(path)
    images, texts, waves = (folders.with_suffix(found, of) for of in (SUFFIXES, {".txt"}, {".wav"}))
    refused = {
        kind: f"{len(files)} {kind} files beside {others}"
        for kind, files, stronger in (("image", images, []), ("text", texts, images + waves), ("audio", waves, []))
        if (others := folders.outnumbering(files, found, stronger))
    }
    makers: Makers = {}
    table = None
    if images and "image" not in refused:
        table = find_captions(path, found)
        folder = folders.ImageFolder(path, images, table)
        named = {"images": folder.images, "domains": folder.domains, "pairs": folder.pairs}
        for kind in folder.kinds:
            makers[kind] = partial(named[kind], c.image_size, c.held_out)
    if texts and "text" not in refused:
        makers["text"] = lambda: text.text_dataset(
            c.source, text.read_texts([path / file for file in texts]), c.held_out, c.tokens
        )
    if waves and "audio" not in refused:
        makers["audio"] = lambda: audio.read_wavs(c.source, [path / file for file in waves], c.seconds, c.held_out)
    if not makers:
        expected, got = "images (.png, .jpg, ...), .txt or .wav files in it", folders.suffixes_of(found)
        if refused:
            expected, got = f"a folder of {expected.removesuffix(' in it')}, or one file", "; ".join(refused.values())
        raise ValueError(f"{path}: expected {expected}, got {got}")
    c.refuse_unused(
        (IMAGES if "images" in makers else NONE)
        | (TEXT if "text" in makers else NONE)
        | (AUDIO if "audio" in makers else NONE)
    )
    used = {"text": texts, "audio": waves}
    left = {kind: set(found) - set(used.get(kind, [*images, table])) for kind in makers}
    return {kind: partial(_with_note, make, sorted(left[kind])) for kind, make in makers.items()}


def _table(c: DataConfig) -> Makers:
    table = hub.Table(c.source, c.column)
    c.refuse_unused(COLUMN | (IMAGES if "images" in table.kinds else NONE) | (TEXT if "text" in table.kinds else NONE))
    makers: Makers = {}
    for kind in table.kinds:
        if kind == "text":
            makers[kind] = lambda: table.text(c.held_out, c.tokens)
        else:
            makers[kind] = partial(table.images if kind == "images" else table.domains, c.image_size, c.held_out)
    return makers


def _with_note(make: Callable[[], Dataset], left_out: list[Path]) -> Dataset:
    """The data set, and what ``describe`` says of files that it does not use."""
    data = make()
    if not left_out:
        return data
    note = f"files of other types were left out: {folders.suffixes_of(left_out)}"
    return dataclasses.replace(data, about={**data.about, "warnings": [note]})
