"""Picture files: read by Pillow, upright, grey or colour, one size; in memory where they fit."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Items
from fastgen.data._optional import need

Array: TypeAlias = "np.ndarray[Any, Any]"
Result = TypeVar("Result")

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".ico", ".qoi")
)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000", "ICO", "QOI")
"""None that Pillow hands to another program."""

MEMORY_LIMIT = 2 << 30
"""Bytes of pixels up to which pictures are decoded once, into memory; beyond, whenever they are asked for."""

GREY_MODES = frozenset(("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I"))
WIDE_MODES = frozenset(("I;16", "I;16B", "I;16L", "I"))


@dataclass(frozen=True)
class Files:
    """Encoded pictures: ``read(i)`` gives the bytes of the one called ``names[i]``."""

    names: Sequence[str]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Header:
    """What a file says before its pixels are decoded; width and height as seen upright."""

    width: int
    height: int
    grey: bool
    digest: bytes


CHUNK = 4096  # what is queued at once


def in_threads(work: Callable[[int], Result], n: int) -> list[Result]:
    """[work(0), ..., work(n - 1)], on every core. Raises what the first to fail raised."""
    formats()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        chunks = (range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))
        return [result for chunk in chunks for result in pool.map(work, chunk)]


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    image = need("PIL.Image", "pillow", "images")
    image.init()
    return tuple(name for name in FORMATS if name in image.OPEN)


def open_picture(data: bytes, name: str) -> Any:
    """A PIL image whose pixels are not decoded yet. ValueError names the file."""
    if not data:
        raise ValueError(f"{name}: expected an image, got an empty file")
    image = need("PIL.Image", "pillow", name)
    try:
        return image.open(io.BytesIO(data), formats=formats())
    except Exception as error:
        unknown = isinstance(error, image.UnidentifiedImageError)
        got = "something else" if unknown else str(error)
        raise ValueError(f"{name}: expected an image, got {got}") from error


def header(data: bytes, name: str) -> Header:
    """Raises ValueError where the file is no picture, or one of floats."""
    picture = open_picture(data, name)
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM")):
        raise ValueError(f"{name}: expected pixels of 8 or 16 bits, got {picture.format} of 32 bits")
    width, height = picture.size
    try:
        turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # a broken EXIF block says nothing, as in every viewer
        turned = False
    grey = picture.mode in GREY_MODES
    if picture.mode in ("P", "PA"):
        grey = _grey_palette(picture, name)
    return Header(*((height, width) if turned else (width, height)), grey, hashlib.sha256(data).digest())


def _grey_palette(picture: Any, name: str) -> bool:
    try:
        colours = np.frombuffer(bytes(picture.getpalette()), np.uint8).reshape(-1, 3)
    except Exception as error:
        raise ValueError(f"{name}: expected an image, got one that can't be decoded: {error}") from error
    return bool((colours == colours[:, :1]).all())


def decode(data: bytes, name: str, channels: int, size: int) -> Array:
    """Pixels (channels, H, W) uint8 of one picture: its first frame, upright, on white where it is transparent.

    Args:
        channels: 1 (grey: ITU-R 601 luma) or 3. size: as of ``fit``; 0 leaves it as it is.

    Raises:
        ValueError: the file is truncated, or no picture. Names it.
    """
    picture = open_picture(data, name)
    image, ops = need("PIL.Image", "pillow", name), need("PIL.ImageOps", "pillow", name)
    try:
        picture.load()
        try:
            picture = ops.exif_transpose(picture)
        except Exception:  # as in header: pixels without orientation are upright
            picture = picture.copy()
        if picture.mode in WIDE_MODES:
            picture = image.fromarray((np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
        if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = image.alpha_composite(image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
    except Exception as error:
        raise ValueError(f"{name}: expected an image, got one that can't be decoded: {error}") from error
    pixels: Array = np.array(fit(picture, size) if size else picture)
    return pixels[None] if channels == 1 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


def fit(picture: Any, size: int) -> Any:
    """The shorter side resized to ``size`` (bicubic, antialiased), the centre cropped square."""
    if picture.size == (size, size):
        return picture
    image, ops = need("PIL.Image", "pillow", "image_size"), need("PIL.ImageOps", "pillow", "image_size")
    return ops.fit(picture, (size, size), method=image.Resampling.BICUBIC)


def fit_array(pixels: Tensor, size: int) -> Tensor:
    """Pixels (N, C, H, W) uint8, each picture as by ``fit``."""
    if tuple(pixels.shape[2:]) == (size, size):
        return pixels
    image = need("PIL.Image", "pillow", "image_size")
    out = torch.empty(*pixels.shape[:2], size, size, dtype=torch.uint8)
    for planes, target in zip(pixels.numpy(), out, strict=True):
        for plane, place in zip(planes, target, strict=True):
            place.copy_(torch.from_numpy(np.array(fit(image.fromarray(plane), size))))
    return out


@dataclass(frozen=True)
class LazyPictures:
    """A stack of pictures (N, C, S, S) that are decoded when indexed."""

    files: Files
    chosen: Tensor
    channels: int
    size: int
    resize: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.chosen), self.channels, self.size, self.size)

    def __len__(self) -> int:
        return len(self.chosen)

    def subset(self, indices: Tensor) -> LazyPictures:
        return LazyPictures(self.files, self.chosen[indices], self.channels, self.size, self.resize)

    def __getitem__(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8)
        numbers = self.chosen[indices.cpu()].tolist()
        in_threads(lambda place: self._decode(numbers[place], out[place]), len(numbers))
        return out

    def _decode(self, i: int, out: Tensor) -> None:
        name = self.files.names[i]
        pixels = decode(self.files.read(i), name, self.channels, self.size if self.resize else 0)
        if pixels.shape != out.shape:
            raise ValueError(f"{name}: expected shape {tuple(out.shape)}, got {pixels.shape}: the file has changed")
        out.copy_(torch.from_numpy(pixels))


Stack: TypeAlias = Tensor | LazyPictures
"""Pictures (N, C, S, S) uint8."""


def choose(stack: Stack, indices: Tensor) -> Stack:
    """Some of them; those on disk stay there."""
    return stack.subset(indices) if isinstance(stack, LazyPictures) else stack[indices]


class LazyItems(Items):
    """As ``TensorItems``, of pictures some of which are decoded when asked for."""

    lazy = True

    def __init__(self, stacks: dict[str, Stack], scale: dict[str, float]) -> None:
        self.stacks, self.scale = stacks, scale

    def __len__(self) -> int:
        return len(next(iter(self.stacks.values())))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        chosen = {name: stack[indices.cpu()] for name, stack in self.stacks.items()}
        return {name: part.float() / self.scale[name] if name in self.scale else part for name, part in chosen.items()}


def read_headers(files: Files) -> list[Header]:
    """Reads every file; ValueError names the first that is no picture."""
    return in_threads(lambda i: header(files.read(i), files.names[i]), len(files))


def read_stack(name: str, files: Files, headers: list[Header], image_size: int, channels: int) -> Stack:
    """All the pictures, in one size.

    Raises:
        ValueError: different sizes or not square, and no ``image_size``; a file that can't be decoded.
    """
    if not image_size:
        first = headers[0]
        for file, other in zip(files.names, headers, strict=True):
            if (other.width, other.height) != (first.width, first.height):
                raise ValueError(
                    f"{name}: expected images of one size, got {first.width}x{first.height} ({files.names[0]}) and "
                    f"{other.width}x{other.height} ({file}): --image-size resizes and crops them"
                )
        square(name, first.height, first.width)
    size = image_size or headers[0].width
    lazy = LazyPictures(files, torch.arange(len(files)), channels, size, resize=bool(image_size))
    return lazy if len(files) * channels * size * size > MEMORY_LIMIT else lazy[torch.arange(len(files))]


def square(name: str, height: int, width: int) -> None:
    if height != width:
        raise ValueError(
            f"{name}: images: expected square ones, got height {height} and width {width}: "
            "--image-size resizes and crops them"
        )
