"""Samples as files: images as PNG grids, texts as they are, audio as WAV with plots of the waveforms."""

from __future__ import annotations

import io
import math
import wave
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgen.models import Images, Samples, Sounds, Texts
from fastgen.train.files import inside, make_folder, write_whole

TARGET_SIZE = 64
MAX_SCALE = 8
GAP = 4
GAP_SHADE = 0.35
NOT_FINITE = (1.0, 0.0, 0.85)
"""The color of pixels that are NaN or infinite."""

TEXT_SEPARATOR = "─" * 40
"""The line between two texts of a file."""

SILENCE = 0.25
"""Seconds between two sounds of a file."""

WAVE_SIZE = (97, 1024)
"""Height (odd, with silence in the middle) and width in pixels of the plot of a waveform."""
WAVE_SHADE, AXIS_SHADE, PAPER_SHADE = 0.2, 0.8, 1.0


def save_samples(folder: Path, stem: str, samples: Samples) -> Path:
    """Write samples into ``folder``, which is created if missing.

    Images become ``stem``.png; Texts ``stem``.txt in UTF-8, with ``TEXT_SEPARATOR`` in a line between two; Sounds
    ``stem``.wav of 16 bits, one after another, and ``stem``.png of the waves. Values are clamped to their range; where
    they are not finite, pixels have the color ``NOT_FINITE`` and audio is silent.

    Returns:
        The PNG, text or WAV file.

    Raises:
        ValueError: ``stem`` is no plain name, or the samples are empty or have another shape.
        TypeError: not samples.
        OSError: the folder can't be made, or the file not written.
    """
    if isinstance(samples, Images):
        files = {".png": _png(_image_sheet(samples))}
    elif isinstance(samples, Texts):
        files = {".txt": _joined(samples.texts)}
    elif isinstance(samples, Sounds):
        waves = checked_waves(samples)
        files = {".wav": encode_wav(waves, samples.sample_rate), ".png": _png(_wave_sheet(waves))}
    else:
        raise TypeError(f"samples: expected Images, Texts or Sounds, got {type(samples).__name__}")
    paths = [inside(folder, stem + suffix) for suffix in files]
    inside(folder, stem)
    make_folder(folder)
    for path, data in zip(paths, files.values(), strict=True):
        write_whole(path, data)
    return paths[0]


# --------------------------------------------------------------------------------------------------
# Images


def _image_sheet(images: Images) -> Tensor:
    pixels, columns = images.pixels, images.columns
    if pixels.dim() != 4 or pixels.size(1) not in (1, 3) or 0 in pixels.shape:
        raise ValueError(f"pixels: expected (N, C, H, W) with C 1 or 3, none of them 0, got {tuple(pixels.shape)}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns: expected a positive number, got {columns}")
    return _sheet(_rows(pixels, columns or math.ceil(math.sqrt(len(pixels)))))


def _rows(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) -> (rows, columns, C, H, W), the last row filled up."""
    images = images.detach().float().cpu()
    rows = math.ceil(len(images) / columns)
    blanks = images.new_full((rows * columns - len(images), *images.shape[1:]), GAP_SHADE)
    return torch.cat([images, blanks]).view(rows, columns, *images.shape[1:])


def _colored(cells: Tensor) -> Tensor:
    """Pixels (*, C, H, W) with those that are not finite in the color ``NOT_FINITE``."""
    finite = cells.isfinite().all(dim=-3, keepdim=True)
    if bool(finite.all()):
        return cells
    color = cells.new_tensor(NOT_FINITE).view(3, 1, 1)
    return torch.where(finite, cells.expand(*cells.shape[:-3], 3, *cells.shape[-2:]), color)


def _sheet(cells: Tensor) -> Tensor:
    """(rows, columns, C, H, W) -> one image (C, height, width), enlarged, with gaps."""
    cells = _colored(cells)
    scale = max(1, min(MAX_SCALE, TARGET_SIZE // cells.size(-1)))
    cells = cells.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    cells = F.pad(cells, (0, GAP, 0, GAP), value=GAP_SHADE)
    rows, columns, channels, height, width = cells.shape
    sheet = cells.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return F.pad(sheet, (GAP, 0, GAP, 0), value=GAP_SHADE)


def _png(sheet: Tensor) -> bytes:
    return encode_png((sheet.clamp(0, 1) * 255).round().to(torch.uint8))


def encode_png(pixels: Tensor) -> bytes:
    """A PNG file of pixels (C, H, W) uint8."""
    rows = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(rows[:, :, 0] if rows.shape[2] == 1 else rows)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------
# Texts and audio


def _joined(texts: list[str]) -> bytes:
    if not texts:
        raise ValueError("texts: expected at least one, got none")
    return (f"\n{TEXT_SEPARATOR}\n".join(texts) + "\n").encode("utf-8", errors="replace")


def checked_waves(sounds: Sounds) -> Tensor:
    """The waves (N, samples) on the CPU, finite and within [-1, 1]."""
    waves, rate = sounds.waves, sounds.sample_rate
    if waves.dim() != 2 or 0 in waves.shape:
        raise ValueError(f"waves: expected (N, samples), neither of them 0, got {tuple(waves.shape)}")
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
        raise ValueError(f"sample_rate: expected a positive integer, got {rate!r}")
    return waves.detach().float().cpu().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)


def encode_wav(waves: Tensor, sample_rate: int) -> bytes:
    """One channel of 16 bits, little endian, with a gap after each wave but the last."""
    gap = round(SILENCE * sample_rate)
    samples = (F.pad(waves, (0, gap)).flatten()[: waves.numel() + gap * (len(waves) - 1)] * 32767).round()
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def _wave_sheet(waves: Tensor) -> Tensor:
    """(N, samples) -> (1, height, width): a row for each wave, from the lowest to the highest value of each column."""
    height, width = WAVE_SIZE
    length = waves.size(1)
    starts = torch.arange(width) * length // width
    ends = torch.maximum((torch.arange(width) + 1) * length // width, starts + 1)
    longest = int((ends - starts).max())
    index = torch.minimum(starts[:, None] + torch.arange(longest), ends[:, None] - 1)  # (width, longest)
    middle = (height - 1) / 2
    low, high = (extreme * middle for extreme in waves[:, index].aminmax(dim=2))
    level = middle - torch.arange(height, dtype=waves.dtype)[:, None]  # of each pixel row, 0 in the middle
    covered = (level >= low[:, None] - 0.5) & (level <= high[:, None] + 0.5)  # (N, height, width)
    sheet = torch.where(covered, WAVE_SHADE, torch.where(level.abs() <= 0.5, AXIS_SHADE, PAPER_SHADE))
    return F.pad(sheet, (0, 0, 0, GAP), value=PAPER_SHADE).flatten(0, 1)[None]
