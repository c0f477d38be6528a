"""A 3x3 convolution beside a change of size, done in one: the same numbers at 4/9 of the cost.

Karras et al., "Progressive growing of GANs" (2018), call it a fused scale.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def _widened(weight: Tensor) -> Tensor:
    """Kernels (..., 3, 3), convolved with a square of four ones: (..., 4, 4)."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return rows[..., 1:] + rows[..., :-1]


def convolve_then_halve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Means of 2x2 squares of a padded 3x3 convolution: a 4x4 one of stride 2. x (B, C, 2H, 2W) -> (B, D, H, W)."""
    return F.conv2d(x, 0.25 * _widened(weight), bias, stride=2, padding=1)


def double_then_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A padded 3x3 convolution of x at twice its size, each value four times: a transposed 4x4 one of stride 2.

    x (B, C, H, W) -> (B, D, 2H, 2W).
    """
    return F.conv_transpose2d(x, _widened(weight).flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)
