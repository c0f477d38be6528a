"""Encoded image files: decoded by Pillow, upright, grayscale or color, one size; in memory where they fit."""

from __future__ import annotations

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastgen.data._base import Items
from fastgen.data._files import broken_files, read_bytes
from fastgen.data._optional import need

Array: TypeAlias = "np.ndarray[Any, Any]"
Result = TypeVar("Result")

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".jp2", ".ico", ".qoi")
)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "AVIF", "JPEG2000", "ICO", "QOI")
"""Formats that Pillow decodes itself, without starting another program."""

ANIMATED = frozenset(("GIF", "PNG", "WEBP", "AVIF", "TIFF"))

MEMORY_LIMIT = 2 << 30
"""Bytes of pixels up to which images are decoded once, into memory; larger sets are decoded batch by batch."""

GRAY_MODES = frozenset(("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I"))
PHOTOMETRIC = 262  # TIFF's PhotometricInterpretation
WIDE_MODES = frozenset(("I;16", "I;16B", "I;16L", "I"))
CHUNK = 4096  # files queued at once


class EncodedImages(ABC):
    """Encoded images by index; ``name`` is for error messages. half: see ``decode``."""

    half: int | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, i: int) -> str: ...

    @abstractmethod
    def read(self, i: int) -> bytes: ...


@dataclass(frozen=True)
class ImageFiles(EncodedImages):
    """Images in files."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def read(self, i: int) -> bytes:
        return read_bytes(self.paths[i])


class Header(NamedTuple):
    """Properties of an encoded image that are known before its pixels are decoded; the size is that of it upright."""

    width: int
    height: int
    gray: bool
    digest: bytes
    frames: int = 1


def in_threads(work: Callable[[int], Result], n: int) -> list[Result]:
    """[work(0), ..., work(n - 1)], on every core. Raises the exception of the first call that failed."""
    formats()
    pool = _threads(os.getpid())
    chunks = (range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))
    return [result for chunk in chunks for result in pool.map(work, chunk)]


@functools.lru_cache(1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The threads of this process, which a forked one does not inherit."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, 16))


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    image = need("PIL.Image", "pillow", "images")
    image.init()
    return tuple(name for name in FORMATS if name in image.OPEN)


def open_image(data: bytes, name: str) -> Any:
    """A PIL image whose pixels are not decoded yet. ValueError names the file."""
    if not data:
        raise ValueError(f"{name}: expected an image, got an empty file")
    pil = need("PIL.Image", "pillow", name)
    try:
        return pil.open(io.BytesIO(data), formats=formats())
    except Exception as error:
        unknown = isinstance(error, pil.UnidentifiedImageError)
        got = "something else" if unknown else str(error)
        raise ValueError(f"{name}: expected an image, got {got}") from error


def header(data: bytes, name: str, half: int | None = None) -> Header:
    """Raises ValueError where the file is no image, or one with pixels of 32 bits. half: see ``decode``."""
    image = open_image(data, name)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(f"{name}: expected pixels of 8 or 16 bits, got {image.format} of 32 bits")
    width, height = image.size
    if image.format == "TIFF":  # some versions of Pillow give the size of it upright
        width, height = image.tag_v2[256], image.tag_v2[257]
    try:
        rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # a broken EXIF block is ignored, as by every viewer
        rotated = False
    gray = image.mode in GRAY_MODES
    if image.mode in ("P", "PA"):
        gray = _gray_palette(image, name)
    width, height = (height, width) if rotated else (width, height)
    if half is not None:
        if width != 2 * height:
            raise ValueError(
                f"{name}: expected two square images side by side, twice as wide as high, got {width}x{height}"
            )
        width //= 2
    return Header(width, height, gray, hashlib.sha256(data).digest(), _frames(image))


def _frames(image: Any) -> int:
    """The number of frames of an animation, or of pages of a TIFF file; what some JPEG files hold beside is none."""
    if image.format not in ANIMATED:
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # decoding the pixels says what is wrong
        return 1


def _gray_palette(image: Any, name: str) -> bool:
    try:
        colors = np.frombuffer(bytes(image.getpalette()), np.uint8).reshape(-1, 3)
    except Exception as error:
        raise ValueError(f"{name}: expected an image, got one that can't be decoded: {error}") from error
    return bool((colors == colors[:, :1]).all())


def is_complete(data: bytes) -> bool:
    """Whether a PNG or JPEG file ends as it should, which a truncated one does not. False for other formats."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[-8:-4] == b"IEND"
    return data[:2] == b"\xff\xd8" and data.rstrip(b"\0")[-2:] == b"\xff\xd9"


def decode(data: bytes, name: str, channels: int, size: int, half: int | None = None) -> Array:
    """Pixels (channels, H, W) uint8 of an encoded image: its first frame, upright, on white where it is transparent.

    Args:
        channels: 1 (grayscale: ITU-R 601 luma) or 3.
        size: see ``fit``; 0 leaves the size as it is.
        half: 0 or 1, the left or the right half of the image, before it is resized; None: all of it.

    Raises:
        ValueError: the file is truncated, or no image; names it.
    """
    image = open_image(data, name)
    pil, ops = need("PIL.Image", "pillow", name), need("PIL.ImageOps", "pillow", name)
    try:
        photometric = getattr(image, "tag_v2", {}).get(PHOTOMETRIC)
        image.load()
        try:
            image = ops.exif_transpose(image)
        except Exception:  # as in header: pixels without orientation are upright
            image = image.copy()
        if image.mode in WIDE_MODES:
            image = pil.fromarray(_first_byte(image, photometric))
        if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = pil.alpha_composite(pil.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        if half is not None:
            middle = image.width // 2
            image = image.crop((half * middle, 0, (half + 1) * middle, image.height))
    except Exception as error:
        raise ValueError(f"{name}: expected an image, got one that can't be decoded: {error}") from error
    pixels: Array = np.array(fit(image, size) if size else image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


def _first_byte(image: Any, photometric: int | None) -> Array:
    """(H, W) uint8, the higher byte of 16-bit gray pixels; 255 where they are transparent."""
    wide: Array = np.asarray(image).astype(np.int64).clip(0, 65535)
    high = (wide >> 8).astype(np.uint8)
    if photometric == 0:  # white is 0; Pillow inverts 8 bits only
        high = 255 - high
    transparent = image.info.get("transparency")
    return np.where(wide == transparent, 255, high).astype(np.uint8) if isinstance(transparent, int) else high


def fit(image: Any, size: int) -> Any:
    """The shorter side resized to ``size`` (bicubic, antialiased), the center cropped square."""
    if image.size == (size, size):
        return image
    pil, ops = need("PIL.Image", "pillow", "image_size"), need("PIL.ImageOps", "pillow", "image_size")
    return ops.fit(image, (size, size), method=pil.Resampling.BICUBIC)


def fit_array(pixels: Tensor, size: int) -> Tensor:
    """Pixels (N, C, H, W) uint8, each image as by ``fit``."""
    if tuple(pixels.shape[2:]) == (size, size):
        return pixels
    pil = need("PIL.Image", "pillow", "image_size")
    out = torch.empty(*pixels.shape[:2], size, size, dtype=torch.uint8)
    for planes, target in zip(pixels.numpy(), out, strict=True):
        for plane, place in zip(planes, target, strict=True):
            place.copy_(torch.from_numpy(np.array(fit(pil.fromarray(plane), size))))
    return out


@dataclass(frozen=True)
class LazyImages:
    """A stack of images (N, C, S, S) that are decoded when indexed."""

    files: EncodedImages
    chosen: Tensor
    channels: int
    size: int
    resize: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.chosen), self.channels, self.size, self.size)

    def __len__(self) -> int:
        return len(self.chosen)

    def subset(self, indices: Tensor) -> LazyImages:
        return LazyImages(self.files, self.chosen[indices], self.channels, self.size, self.resize)

    def __getitem__(self, indices: Tensor) -> Tensor:
        out = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8)
        numbers = self.chosen[indices.cpu()].tolist()
        in_threads(lambda place: self._decode(numbers[place], out[place]), len(numbers))
        return out

    def _decode(self, i: int, out: Tensor) -> None:
        name = self.files.name(i)
        pixels = decode(self.files.read(i), name, self.channels, self.size if self.resize else 0, self.files.half)
        if pixels.shape != out.shape:
            raise ValueError(f"{name}: expected shape {tuple(out.shape)}, got {pixels.shape}: the file has changed")
        out.copy_(torch.from_numpy(pixels))


Stack: TypeAlias = Tensor | LazyImages
"""Images (N, C, S, S) uint8."""


def choose(stack: Stack, indices: Tensor) -> Stack:
    """Some of the images; lazy ones stay lazy."""
    return stack.subset(indices) if isinstance(stack, LazyImages) else stack[indices]


class LazyItems(Items):
    """As ``TensorItems``, some of whose images are decoded batch by batch."""

    lazy = True

    def __init__(self, stacks: dict[str, Stack], scale: dict[str, float]) -> None:
        self.stacks, self.scale = stacks, scale

    def __len__(self) -> int:
        return len(next(iter(self.stacks.values())))

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        chosen = {name: stack[indices.cpu()] for name, stack in self.stacks.items()}
        return {name: part.float() / self.scale[name] if name in self.scale else part for name, part in chosen.items()}


class ReadImages(NamedTuple):
    """Images in one size. contents: a digest of each file. kept: the files that are images. notes: for ``describe``."""

    stack: Stack
    contents: bytes
    kept: list[int]
    notes: tuple[str, ...]


def read_stack(
    name: str, files: EncodedImages, image_size: int, *, skip_broken: bool = False, channels: int = 0
) -> ReadImages:
    """All images in one size.

    Each file is read once, unless the pixels exceed ``MEMORY_LIMIT``: then it is only checked here.

    Args:
        skip_broken: leave out files that are no images, or truncated.
        channels: 1 or 3; 0: gray where every file is gray, else color.

    Raises:
        ValueError: different sizes or not square, and no ``image_size``; files that can't be decoded, all of them in
            one message; an image in color where ``channels`` is 1.
    """

    def read(i: int) -> tuple[Header, Array | None] | ValueError:
        try:
            name, data = files.name(i), files.read(i)
            found = header(data, name, files.half)
            depth = channels or (1 if found.gray else 3)
            pixels = image_size**2 or found.width * found.height
            fits = len(files) * depth * pixels <= MEMORY_LIMIT
            if not fits and is_complete(data):
                return found, None
            decoded = decode(data, name, depth, image_size, files.half)
            return found, decoded if fits else None
        except ValueError as error:
            return error

    results = in_threads(read, len(files))
    broken = {i: str(result) for i, result in enumerate(results) if isinstance(result, ValueError)}
    good = [result for result in results if not isinstance(result, ValueError)]
    kept = [i for i in range(len(files)) if i not in broken]
    notes = broken_files(name, "images", files.name, len(files), broken, skip=skip_broken)
    if not good:
        raise ValueError(f"{name}: expected images, got {len(files)} files of which none can be decoded")
    headers, decoded = zip(*good, strict=True)
    first = headers[0]
    if not image_size:
        for i, other in zip(kept, headers, strict=True):
            if (other.width, other.height) != (first.width, first.height):
                raise ValueError(
                    f"{name}: expected images of one size, got {first.width}x{first.height} ({files.name(kept[0])}) "
                    f"and {other.width}x{other.height} ({files.name(i)}): --image-size resizes and crops them"
                )
        require_square(name, first.height, first.width)
    elif enlarged := sum(min(each.width, each.height) < image_size for each in headers):
        notes += (f"{enlarged:,} of {len(headers):,} images are smaller than {image_size} and were enlarged",)
    if animated := sum(each.frames > 1 for each in headers):
        notes += (f"of {animated:,} images with several frames the first one is read",)
    size = image_size or first.width
    colored = next((i for i, each in zip(kept, headers, strict=True) if not each.gray), None)
    if channels == 1 and colored is not None:
        raise ValueError(f"{files.name(colored)}: expected a gray image, as the training images are, got one in color")
    depth = channels or (1 if colored is None else 3)
    contents = b"".join(each.digest for each in headers)
    if any(pixels is None for pixels in decoded):
        lazy = LazyImages(files, torch.tensor(kept), depth, size, resize=bool(image_size))
        return ReadImages(lazy, contents, kept, notes)
    stack = torch.empty(len(kept), depth, size, size, dtype=torch.uint8)
    for target, pixels in zip(stack, decoded, strict=True):
        target.copy_(torch.from_numpy(pixels))  # gray pixels fill all three channels
    return ReadImages(stack, contents, kept, notes)


def require_square(name: str, height: int, width: int) -> None:
    if height != width:
        raise ValueError(
            f"{name}: images: expected square ones, got height {height} and width {width}: "
            "--image-size resizes and crops them"
        )
