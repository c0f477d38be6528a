"""Sets of images: scikit-learn's digits, or a user's .npz file."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array: TypeAlias = "np.ndarray[Any, Any]"

HELD_OUT = 5  # one image in this many is held out
MIN_IMAGES = 10


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images of one size, split into a training and a held-out part.

    name: "digits" or the file's path. train, test: (N, C, H, W) float32 in [0, 1], multiples of
    1 / (levels - 1). train_labels, test_labels: (N,) int64 where the source has labels.
    """

    name: str
    train: Tensor
    test: Tensor
    levels: int
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None

    def fingerprint(self) -> str:
        """Tells whether two data sets hold the same images, split in the same way."""
        digest = hashlib.sha256(f"{self.levels} {tuple(self.train.shape)} {tuple(self.test.shape)}".encode())
        for part in (self.train, self.test):
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_images(source: str) -> ImageData:
    """Read a data set. The held-out fifth is the same on every call, drawn per class where there are labels.

    Args:
        source: "digits", scikit-learn's 1797 handwritten digits of 8x8 pixels with 17 levels (each counts
            the ink in a 4x4 block of the scan: Alpaydin and Kaynak, "Optical recognition of handwritten
            digits", 1998); or the path of an .npz file with an array ``images``, uint8 of shape (N, H, W),
            (N, C, H, W) or (N, H, W, C), C being 1 or 3, and optionally ``labels``, integers of shape (N,).
            Images of only 0 and 1, or only 0 and 255, have 2 levels, all others 256. Reading runs no code.

    Raises:
        FileNotFoundError: no such file. TypeError: an array of another dtype.
        ValueError: not an .npz file, an array missing or of another shape. Each names the file.
    """
    if source == "digits":
        return _load_digits()
    return _load_npz(Path(source))


def _load_digits() -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _split("digits", digits.images[:, None], np.asarray(digits.target), levels=17)


def _load_npz(path: Path) -> ImageData:
    images, labels = _read_arrays(path)
    if images.dtype != np.uint8:
        bad = int((~np.isfinite(images)).sum()) if np.issubdtype(images.dtype, np.inexact) else 0
        note = f", {bad} of them NaN or infinite" if bad else ""
        raise TypeError(f"{path}: images: expected uint8 pixels from 0 to 255, got {images.dtype}{note}")
    images = _channels_first(path, images)
    if len(images) < MIN_IMAGES:
        raise ValueError(f"{path}: images: expected at least {MIN_IMAGES} of them, got {len(images)}")
    if labels is not None:
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"{path}: labels: expected integers, got {labels.dtype}")
        if labels.shape != (len(images),):
            raise ValueError(f"{path}: labels: expected shape ({len(images)},), got {labels.shape}")

    highest = int(images.max())
    if highest in (1, 255) and bool(np.isin(images, (0, highest)).all()):
        return _split(str(path), images // highest, labels, levels=2)
    return _split(str(path), images, labels, levels=256)


def _read_arrays(path: Path) -> tuple[Array, Array | None]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected 'digits' or an .npz file, got a path where there is nothing")
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"{path}: expected 'digits' or an .npz file, got something else")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = sorted(archive.files)
            images = archive["images"] if "images" in names else None
            labels = archive["labels"] if "labels" in names else None
    except (AttributeError, EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected an .npz file of plain arrays, got one that fails: {error}") from error
    if images is None:
        raise ValueError(f"{path}: expected an array named 'images', got {', '.join(names) or 'no arrays'}")
    return images, labels


def _channels_first(path: Path, images: Array) -> Array:
    if images.ndim == 3 and images.size:
        return images[:, None]
    if images.ndim == 4 and images.size and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.size and images.shape[3] in (1, 3):
        return np.moveaxis(images, 3, 1)
    raise ValueError(
        f"{path}: images: expected shape (N, H, W), (N, C, H, W) or (N, H, W, C) with C 1 or 3, got {images.shape}"
    )


def _split(name: str, counts: Array, labels: Array | None, levels: int) -> ImageData:
    """Shuffle, sort by class, and hold out one in HELD_OUT: each class gives its share, to within one image."""
    images = torch.from_numpy(np.ascontiguousarray(counts)).float() / (levels - 1)
    classes = None if labels is None else torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    if classes is not None:
        order = order[classes[order].argsort(stable=True)]
    held_out = torch.zeros(len(images), dtype=torch.bool)
    held_out[order[::HELD_OUT]] = True
    if classes is None:
        return ImageData(name, images[~held_out], images[held_out], levels)
    return ImageData(name, images[~held_out], images[held_out], levels, classes[~held_out], classes[held_out])
