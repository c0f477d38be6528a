"""Paths between latents of a standard normal distribution, to visualize what a model has learned."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.checks import require_count, require_positive

PARALLEL = 1e-4  # sine of the angle below which a path is straight


def great_circles(ends: Tensor, columns: int) -> Tensor:
    """Spherical interpolation (Shoemake, "Animating rotation with quaternion curves", 1985).

    In many dimensions all latents of N(0, 1) have about the same length, and so have those on these paths; on straight
    lines they are shorter.

    Args:
        ends: (2 * rows, D), both ends of each path, one after the other.
        columns: number of points on a path, at least 2, its ends included.

    Returns:
        (rows * columns, D), path by path.
    """
    require_count("columns", columns, 2, "a number of points, the ends of a path included")
    first, last = ends.unflatten(0, (-1, 2)).unbind(1)
    lengths = (first.norm(dim=1) * last.norm(dim=1)).clamp(min=1e-12)
    angle = torch.acos(((first * last).sum(1) / lengths).clamp(-1, 1))[:, None]  # (rows, 1)
    t = torch.linspace(0, 1, columns, device=ends.device, dtype=ends.dtype)
    sine = angle.sin()
    curved = sine.abs() > PARALLEL
    sine = torch.where(curved, sine, 1.0)
    begin = torch.where(curved, ((1 - t) * angle).sin() / sine, 1 - t)
    end = torch.where(curved, (t * angle).sin() / sine, t)
    path: Tensor = begin[..., None] * first[:, None] + end[..., None] * last[:, None]
    return path.flatten(0, 1)


def row_labels(rows: int, columns: int, label: int, classes: int) -> Tensor:
    """(rows * columns,) int64: the class ``label``, or the classes in turn, one for each row.

    Raises:
        ValueError: there is no such class.
    """
    require_positive("rows", rows)
    if label >= classes:
        raise ValueError(f"label: expected -1 or a class below {classes}, got {label}")
    labels = torch.full((rows,), label) if label >= 0 else torch.arange(rows) % classes
    return labels.repeat_interleave(columns)
