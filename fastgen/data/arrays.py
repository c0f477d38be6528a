"""Images in arrays: NumPy's .npz and .npy, the IDX files of MNIST and similar datasets, CIFAR's binary files."""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastgen.data._files import FEW_COLUMNS, cannot_read, few
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import ImageSource, ImageStack, check_labels, from_pixels
from fastgen.data.images import Array
from fastgen.data.trees import Tree

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
IDX_NAME = re.compile(r"idx\d-ubyte(\.gz)?$|\.idx(\.gz)?$")
IDX_TRAIN, IDX_TEST = (
    re.compile(rf"(^|[-_.])({name})[-_.]images[-_.]idx3", re.IGNORECASE) for name in ("train", "t10k|test")
)
CIFAR_TRAIN, CIFAR_TEST = re.compile(r"(data_batch_\d|train)\.bin"), re.compile(r"test(_batch)?\.bin")
CIFAR_PICKLES = frozenset((*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"))
CIFAR100_PICKLES = frozenset(("train", "test", "meta"))
COARSE_NAMES = "coarse_label_names.txt"
CIFAR_PIXELS = 3 * 32 * 32
TRAIN_AND_TEST = (("x_train", "y_train"), ("x_test", "y_test"))
"""Names of arrays in Keras' mnist.npz and its like."""
KERAS_NAMES = [name for names in TRAIN_AND_TEST for name in names]


class ImageArrays(ImageSource):
    """Images in memory; those of two classes are two domains, too.

    Args:
        images, test: the images, and those of a held-out split, if there is one.
        label_names: label -> name of the class. The labels that occur are then the classes; {}: 0 to the largest are.
    """

    def __init__(
        self,
        config: DataConfig,
        images: ImageStack,
        test: ImageStack | None = None,
        options: Sequence[str] = (),
        label_names: Mapping[int, str] | None = None,
    ) -> None:
        self.config, self.images, self.label_names = config, images, label_names
        self.test = ImageArrays(config, test, label_names=label_names) if test else None
        self.options = frozenset(("image_size", "binarize", "test_data", *options))
        labels = self.read().labels
        two = labels is not None and labels.unique().tolist() == [0, 1]
        self.kinds = ("images", "domains") if two else ("images",)

    def read(self, like: ImageStack | None = None) -> ImageStack:
        labels, names = self.images.labels, self.label_names
        if labels is None or names is None or (like and not like.label_values):
            return self.images
        values = torch.tensor(like.label_values) if like else labels.unique()
        unknown = labels[~torch.isin(labels, values)].unique().tolist()
        if unknown:
            raise ValueError(
                f"{self.config.source}: labels: expected those of the training images ({few(values.tolist())}), got "
                f"{few(unknown)}"
            )
        numbers = values.tolist()
        named = [names.get(number, str(number)) for number in numbers]
        if not names and numbers == [*range(len(numbers))]:
            named = []
        labels = torch.searchsorted(values, labels)
        return dataclasses.replace(self.images, labels=labels, class_names=named, label_values=tuple(numbers))


Split = tuple[ImageStack, ImageStack | None]


def read_npz(path: Path, image_size: int, column: str = "") -> Split:
    """Images of an .npz file, and those of its test split. Reading runs no code.

    Args:
        path: has an array ``images``, uint8 of shape (N, H, W), (N, C, H, W) or (N, H, W, C), C being 1 or 3, and
            optionally ``labels``, integers of shape (N,); or Keras' ``x_train``, ``y_train``, ``x_test`` and
            ``y_test``; or images without a name (``arr_0``).
        column: name of the array of images instead of ``images``.

    Raises:
        TypeError: an array of another dtype. ValueError: not an .npz file, an array missing or of another shape.
    """

    names, arrays = _loaded(path, {column or "images", "arr_0", "labels", *KERAS_NAMES})
    if not column and "x_train" in names:
        (images, labels), (test_images, test_labels) = TRAIN_AND_TEST
        train = _stack(path, image_size, images, arrays[images], arrays.get(labels))
        train = _noted(train, {*names} - {*KERAS_NAMES})
        if test_images not in names:
            return train, None
        return train, _stack(path, image_size, test_images, arrays[test_images], arrays.get(test_labels))
    wanted = column or ("arr_0" if "arr_0" in names and "images" not in names else "images")
    if wanted not in names:
        raise ValueError(f"{path}: expected an array named {wanted!r}, got {few(names, FEW_COLUMNS) or 'no arrays'}")
    stack = _stack(path, image_size, wanted, arrays[wanted], arrays.get("labels"))
    return _noted(stack, {*names} - {wanted, "labels"}), None


def _noted(stack: ImageStack, unused: Set[str]) -> ImageStack:
    if not unused:
        return stack
    return dataclasses.replace(stack, notes=(f"arrays that are not read: {few(sorted(unused), FEW_COLUMNS)}",))


def read_npy(path: Path, image_size: int) -> Split:
    """Images of an .npy file, as in an .npz file, and the labels found beside it: in labels.npy for images.npy, in
    y_train.npy for x_train.npy."""
    beside = [path.with_name(path.name.replace("images", "labels")), path.with_name(re.sub("^[xX]", "y", path.name))]
    found = next((file for file in beside if file != path and file.is_file()), None)
    images, labels = (None if file is None else _loaded(file)[1][""] for file in (path, found))
    assert images is not None
    return _stack(path, image_size, "", images, labels, found), None


def _loaded(path: Path, wanted: Set[str] = frozenset()) -> tuple[list[str], dict[str, Array]]:
    """(names of all arrays, those of them that are wanted) of an .npz file; the array "" of an .npy file."""
    suffix = ".npz" if wanted else ".npy"
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray) != (suffix == ".npy"):
            raise TypeError(f"it holds {'one array' if suffix == '.npz' else 'an archive'}")
        if suffix == ".npy":
            return [""], {"": found}
        with found as archive:
            names = sorted(archive.files)
            return names, {name: archive[name] for name in names if name in wanted}
    except (AttributeError, EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise cannot_read(path, error) from error
        raise ValueError(f"{path}: expected an {suffix} file of plain arrays, got one that fails: {error}") from error


def _stack(
    path: Path, image_size: int, name: str, images: Array, labels: Array | None, labels_path: Path | None = None
) -> ImageStack:
    """name: of the array in the file, "" of an .npy file; labels_path: the file of the labels, default the same."""
    place = f"{path}: {name}" if name else str(path)
    if images.dtype != np.uint8:
        bad = int((~np.isfinite(images)).sum()) if np.issubdtype(images.dtype, np.inexact) else 0
        note = f", {bad} of them NaN or infinite" if bad else ""
        raise TypeError(f"{place}: expected uint8 pixels from 0 to 255, got {images.dtype}{note}")
    pixels = torch.from_numpy(np.ascontiguousarray(_channels_first(place, images)))
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:  # Keras' CIFAR
        labels = labels[:, 0]
    classes = None if labels is None else check_labels(str(labels_path or path), labels, len(pixels))
    return from_pixels(str(path), pixels, image_size, classes)


def _channels_first(place: str, images: Array) -> Array:
    if images.ndim == 3 and images.size:
        return images[:, None]
    if images.ndim == 4 and images.size and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.size and images.shape[3] in (1, 3):
        return np.moveaxis(images, 3, 1)
    raise ValueError(
        f"{place}: expected shape (N, H, W), (N, C, H, W) or (N, H, W, C) with C 1 or 3, got {images.shape}"
    )


# --------------------------------------------------------------------------------------------------
# IDX


def read_idx(tree: Tree, file: Path, image_size: int, name: str = "") -> ImageStack:
    """Images (N, H, W) of an IDX file, gzipped where its name ends with .gz, and the labels found beside it.

    Labels of train-images-idx3-ubyte are looked for in train-labels-idx1-ubyte, with and without .gz.

    Raises:
        ValueError: another magic number, another length than the header says, labels of another number.
    """
    images = torch.from_numpy(_read_idx(tree, file, IMAGES_MAGIC, "images"))[:, None]
    beside = labels_beside(tree, file)
    labels = None
    if beside is not None:
        labels = check_labels(tree.place(beside), _read_idx(tree, beside, LABELS_MAGIC, "labels"), len(images))
    return from_pixels(name or tree.place(file), images, image_size, labels)


def labels_beside(tree: Tree, file: Path) -> Path | None:
    name = file.name.removesuffix(".gz")
    label_name = name.replace("images", "labels").replace("idx3", "idx1")
    candidates = [file.with_name(label_name + ending) for ending in ("", ".gz")]
    return next((each for each in candidates if label_name != name and each in tree.files), None)


def idx_files(tree: Tree) -> dict[str, Path]:
    """The image files of MNIST's four among the files: "train" and "test" (t10k), plain ones before gzipped ones.

    Raises:
        ValueError: several of one split.
    """
    found: dict[str, Path] = {}
    for split, pattern in (("train", IDX_TRAIN), ("test", IDX_TEST)):
        files = [file for file in tree.files if pattern.search(file.name) and IDX_NAME.search(file.name)]
        plain = [
            file
            for file in files
            if file.with_name(file.name.removesuffix(".gz")) == file
            or file.with_name(file.name.removesuffix(".gz")) not in files
        ]
        if len(plain) > 1:
            raise ValueError(
                f"{tree.name}: expected one IDX file of {split} images, got {few(plain)}: give one of "
                "them, and --test-data for the other split"
            )
        if plain:
            found[split] = plain[0]
    return found


def open_idx(config: DataConfig, tree: Tree, files: Mapping[str, Path]) -> ImageArrays:
    """MNIST's files: train images with labels, and t10k images, if there are any, as the held-out split."""
    stacks = {split: read_idx(tree, file, config.image_size, tree.name) for split, file in files.items()}
    train = stacks.pop("train", None)
    mapping = next(filter(None, (mapping_beside(tree, file) for file in files.values())), None)
    names = label_names(tree, mapping)
    source = ImageArrays(config, train or stacks.pop("test"), stacks.get("test"), label_names=names)
    source.used = {file for image in files.values() for file in (image, labels_beside(tree, image)) if file}
    source.used |= {mapping} if mapping else set()
    return source


def mapping_beside(tree: Tree, file: Path) -> Path | None:
    """EMNIST's table of labels beside its images, emnist-letters-mapping.txt beside emnist-letters-train-images-..."""
    mapping = file.with_name(re.split("(?:train|test|t10k)[-_.]images", file.name)[0] + "mapping.txt")
    return mapping if mapping in tree.files else None


def label_names(tree: Tree, mapping: Path | None) -> dict[int, str]:
    """Label -> character, from EMNIST's table: a label and the codes of its characters, of which the first names it, in
    each line. {} where there is none, or one of another form."""
    if mapping is None:
        return {}
    try:
        rows = [
            [int(cell) for cell in line.split()] for line in tree.read(mapping).decode().splitlines() if line.strip()
        ]
        names = {row[0]: chr(row[1]) for row in rows}
    except (IndexError, OverflowError, ValueError):
        return {}
    return names if len({*names.values()}) == len(rows) else {}


def _read_idx(tree: Tree, file: Path, magic: int, what: str) -> Array:
    """The unsigned bytes of a file: a magic number, then the sizes, big-endian 32 bits each, then the bytes."""
    ndim, path, contents = magic & 0xFF, tree.place(file), io.BytesIO(tree.read(file))
    try:
        with gzip.open(contents) if file.suffix == ".gz" else contents as opened:
            head = opened.read(4 + 4 * ndim)
            got = struct.unpack(">I", head[:4])[0] if len(head) >= 4 else None
            if got != magic:
                short = f"a file of {len(head)} bytes" if got is None else str(got)
                raise ValueError(f"{path}: expected the magic number {magic} of IDX {what}, got {short}")
            if len(head) != 4 + 4 * ndim:
                raise ValueError(f"{path}: expected a header of {4 + 4 * ndim} bytes, got {len(head)}")
            shape = struct.unpack(f">{ndim}I", head[4:])
            size = math.prod(shape)
            data = opened.read(size + 1) if size < 1 << 40 else b""
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: expected an IDX file, got one that can't be read: {error}") from error
    if len(data) != size:
        more = "more" if len(data) > size else str(len(data))
        raise ValueError(f"{path}: expected {size} bytes of {what} ({'x'.join(map(str, shape))}), got {more}")
    if not size:
        raise ValueError(f"{path}: expected {what}, got none ({'x'.join(map(str, shape))})")
    values: Array = np.frombuffer(data, np.uint8).reshape(shape).copy()
    return values


# --------------------------------------------------------------------------------------------------
# CIFAR


class CifarFiles(NamedTuple):
    """The files of CIFAR's binary version; label_bytes: 1 of CIFAR-10, 2 (coarse, fine) of CIFAR-100."""

    train: list[Path]
    test: list[Path]
    names: Path | None
    label_bytes: int

    @property
    def used(self) -> set[Path]:
        """Files that belong to the data; CIFAR-100's names of its coarse labels, which are not read, do too."""
        names = [self.names, self.names.with_name(COARSE_NAMES)] if self.names else []
        return {*self.train, *self.test, *names}


def cifar_files(tree: Tree) -> CifarFiles | None:
    """CIFAR's files among those of a folder or an archive.

    Raises:
        ValueError: its pickles, which are not read, as that can run code.
    """
    names = {file.name for file in tree.files}
    if len(names & CIFAR_PICKLES) > 1 or names >= CIFAR100_PICKLES:
        version = "100" if names >= CIFAR100_PICKLES else "10"
        raise ValueError(
            f"{tree.name}: expected CIFAR-{version} in its binary version (cifar-{version}-binary.tar.gz), got its "
            "Python version, whose pickles can run code when they are read"
        )
    train, test = ([f for f in tree.files if pattern.fullmatch(f.name)] for pattern in (CIFAR_TRAIN, CIFAR_TEST))
    if not train and not test:
        return None
    hundred = any(file.name in ("train.bin", "test.bin") for file in train + test)
    wanted = "fine_label_names.txt" if hundred else "batches.meta.txt"
    return CifarFiles(train, test, next((f for f in tree.files if f.name == wanted), None), 2 if hundred else 1)


def open_cifar(config: DataConfig, tree: Tree, files: CifarFiles) -> ImageArrays:
    """CIFAR-10 or CIFAR-100 with fine labels; the test batch is the held-out split."""
    names: list[str] = []
    if files.names:
        names = tree.read(files.names).decode("utf-8", errors="replace").split()
    stacks = [_read_cifar(config, tree, part, files.label_bytes, names) for part in (files.train, files.test) if part]
    source = ImageArrays(config, stacks[0], stacks[1] if len(stacks) > 1 else None)
    source.used = files.used
    return source


def _read_cifar(
    config: DataConfig, tree: Tree, files: Sequence[Path], label_bytes: int, names: Sequence[str]
) -> ImageStack:
    """Records of a label (or a coarse and a fine one), then the red, green and blue planes, row by row."""
    record = label_bytes + CIFAR_PIXELS
    parts = []
    for file in files:
        data = np.frombuffer(tree.read(file), np.uint8)
        if not len(data) or len(data) % record:
            raise ValueError(
                f"{tree.place(file)}: expected CIFAR records of {record} bytes, got a file of {len(data)} bytes"
            )
        parts.append(data.reshape(-1, record))
    records = np.concatenate(parts)
    labels = check_labels(tree.place(files[0]), records[:, label_bytes - 1], len(records))
    pixels = torch.from_numpy(records[:, label_bytes:].reshape(-1, 3, 32, 32).copy())
    return from_pixels(tree.name, pixels, config.image_size, labels, names)
