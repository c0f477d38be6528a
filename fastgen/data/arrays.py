"""Images in arrays: NumPy's .npz, and the IDX files of MNIST and similar datasets."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fastgen.data._base import Dataset, Source
from fastgen.data._files import cannot_read
from fastgen.data.config import DataConfig
from fastgen.data.image_sets import ImageStack, check_labels, domain_dataset, from_pixels, image_dataset
from fastgen.data.images import Array

IMAGES_MAGIC, LABELS_MAGIC = 2051, 2049
IDX_NAME = re.compile(r"idx\d-ubyte(\.gz)?$|\.idx(\.gz)?$")


class ImageArrays(Source):
    """Images in memory; those of two classes are two domains, too."""

    def __init__(self, config: DataConfig, images: ImageStack, options: tuple[str, ...] = ()) -> None:
        self.every, self.images = config.held_out, images
        self.options = frozenset(("image_size", *options))
        two = images.labels is not None and images.labels.unique().tolist() == [0, 1]
        self.kinds = ("images", "domains") if two else ("images",)

    def load(self, kind: str) -> Dataset:
        return (image_dataset if kind == "images" else domain_dataset)(self.images, self.every)


def read_npz(path: Path, image_size: int, column: str = "") -> ImageStack:
    """Images of an .npz file. Reading runs no code.

    Args:
        path: has an array ``images``, uint8 of shape (N, H, W), (N, C, H, W) or (N, H, W, C), C being 1 or 3, and
            optionally ``labels``, integers of shape (N,).
        column: name of the array of images instead of ``images``.

    Raises:
        TypeError: an array of another dtype. ValueError: not an .npz file, an array missing or of another shape.
    """
    wanted = column or "images"
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = sorted(archive.files)
            images = archive[wanted] if wanted in names else None
            labels = archive["labels"] if "labels" in names else None
    except (AttributeError, EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise cannot_read(path, error) from error
        raise ValueError(f"{path}: expected an .npz file of plain arrays, got one that fails: {error}") from error
    if images is None:
        raise ValueError(f"{path}: expected an array named {wanted!r}, got {', '.join(names) or 'no arrays'}")
    if images.dtype != np.uint8:
        bad = int((~np.isfinite(images)).sum()) if np.issubdtype(images.dtype, np.inexact) else 0
        note = f", {bad} of them NaN or infinite" if bad else ""
        raise TypeError(f"{path}: {wanted}: expected uint8 pixels from 0 to 255, got {images.dtype}{note}")
    pixels = torch.from_numpy(np.ascontiguousarray(_channels_first(path, wanted, images)))
    classes = None if labels is None else check_labels(str(path), labels, len(pixels))
    return from_pixels(str(path), pixels, image_size, classes)


def _channels_first(path: Path, name: str, images: Array) -> Array:
    if images.ndim == 3 and images.size:
        return images[:, None]
    if images.ndim == 4 and images.size and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.size and images.shape[3] in (1, 3):
        return np.moveaxis(images, 3, 1)
    raise ValueError(
        f"{path}: {name}: expected shape (N, H, W), (N, C, H, W) or (N, H, W, C) with C 1 or 3, got {images.shape}"
    )


def read_idx(path: Path, image_size: int) -> ImageStack:
    """Images (N, H, W) of an IDX file, gzipped where its name ends with .gz, and the labels found beside it.

    Labels of train-images-idx3-ubyte are looked for in train-labels-idx1-ubyte, with and without .gz.

    Raises:
        ValueError: another magic number, another length than the header says, labels of another number.
    """
    images = torch.from_numpy(_read_idx(path, IMAGES_MAGIC, "images"))[:, None]
    beside = labels_beside(path)
    labels = (
        None if beside is None else check_labels(str(beside), _read_idx(beside, LABELS_MAGIC, "labels"), len(images))
    )
    return from_pixels(str(path), images, image_size, labels)


def labels_beside(path: Path) -> Path | None:
    name = path.name.removesuffix(".gz")
    label_name = name.replace("images", "labels").replace("idx3", "idx1")
    candidates = [path.with_name(label_name + ending) for ending in ("", ".gz")]
    return next((file for file in candidates if label_name != name and file.is_file()), None)


def _read_idx(path: Path, magic: int, what: str) -> Array:
    """The unsigned bytes of a file: a magic number, then the sizes, big-endian 32 bits each, then the bytes."""
    ndim = magic & 0xFF
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * ndim)
            got = struct.unpack(">I", head[:4])[0] if len(head) >= 4 else None
            if got != magic:
                short = f"a file of {len(head)} bytes" if got is None else str(got)
                raise ValueError(f"{path}: expected the magic number {magic} of IDX {what}, got {short}")
            if len(head) != 4 + 4 * ndim:
                raise ValueError(f"{path}: expected a header of {4 + 4 * ndim} bytes, got {len(head)}")
            shape = struct.unpack(f">{ndim}I", head[4:])
            size = math.prod(shape)
            data = file.read(size + 1) if size < 1 << 40 else b""
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise cannot_read(path, error) from error
        raise ValueError(f"{path}: expected an IDX file, got one that can't be read: {error}") from error
    if len(data) != size:
        more = "more" if len(data) > size else str(len(data))
        raise ValueError(f"{path}: expected {size} bytes of {what} ({'x'.join(map(str, shape))}), got {more}")
    if not size:
        raise ValueError(f"{path}: expected {what}, got none ({'x'.join(map(str, shape))})")
    values: Array = np.frombuffer(data, np.uint8).reshape(shape).copy()
    return values
