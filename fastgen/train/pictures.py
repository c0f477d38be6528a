"""PNG grids of images, small ones enlarged so that their pixels can be seen."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fastgen.train.files import write_whole

TARGET_SIZE = 64
MAX_SCALE = 8
GAP = 4
GAP_SHADE = 0.35


def write_grid(path: Path, images: Tensor, columns: int | None = None) -> None:
    """Write images (N, C, H, W) in [0, 1], C 1 or 3, row by row; as square a grid as goes by default."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    _write_png(path, _sheet(_rows(images, columns)))


def write_pairs(path: Path, originals: Tensor, reconstructions: Tensor, columns: int = 16) -> None:
    """Write rows of originals (N, C, H, W), each above the row of its reconstructions."""
    columns = min(columns, len(originals))
    pairs = torch.stack([_rows(originals, columns), _rows(reconstructions, columns)], dim=1)
    _write_png(path, _sheet(pairs.flatten(0, 1)))


def _rows(images: Tensor, columns: int) -> Tensor:
    """(N, C, H, W) -> (rows, columns, C, H, W), the last row filled up."""
    images = images.detach().float().cpu()
    rows = math.ceil(len(images) / columns)
    blanks = images.new_full((rows * columns - len(images), *images.shape[1:]), GAP_SHADE)
    return torch.cat([images, blanks]).view(rows, columns, *images.shape[1:])


def _sheet(cells: Tensor) -> Tensor:
    """(rows, columns, C, H, W) -> one image (C, height, width), enlarged, with gaps."""
    scale = max(1, min(MAX_SCALE, TARGET_SIZE // cells.size(-1)))
    cells = cells.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    cells = F.pad(cells, (0, GAP, 0, GAP), value=GAP_SHADE)
    rows, columns, channels, height, width = cells.shape
    sheet = cells.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)
    return F.pad(sheet, (GAP, 0, GAP, 0), value=GAP_SHADE)


def _write_png(path: Path, sheet: Tensor) -> None:
    pixels = (sheet.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_whole(path, buffer.getvalue())
