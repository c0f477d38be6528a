"""A 3x3 convolution beside a change of size, done in one: the same numbers at 4/9 of the cost.

Karras et al., "Progressive growing of GANs" (2018), call it a fused scale.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn._sublayers import is_fusible


def _widened(weight: Tensor) -> Tensor:
    """Kernels (..., 3, 3), convolved with a square of four ones: (..., 4, 4)."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return rows[..., 1:] + rows[..., :-1]


def _may_be_fused(module: nn.Module) -> bool:
    """Whether it is a plain 3x3 convolution padded with zeros; any other module is called."""
    if not isinstance(module, nn.Conv2d) or type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return False
    sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
    usual = sizes == ((3, 3), (1, 1), (1, 1), (1, 1)) and module.groups == 1 and module.padding_mode == "zeros"
    return usual and is_fusible(module, nn.Conv2d.forward)


def convolve_then_halve(x: Tensor, convolution: nn.Module) -> Tensor:
    """Means of 2x2 squares of a padded 3x3 convolution: a 4x4 one of stride 2. x (B, C, 2H, 2W) -> (B, D, H, W)."""
    if not _may_be_fused(convolution):
        return F.avg_pool2d(convolution(x), 2)
    weight, bias = cast(Tensor, convolution.weight), cast("Tensor | None", convolution.bias)
    return F.conv2d(x, 0.25 * _widened(weight), bias, stride=2, padding=1)


def double_then_convolve(x: Tensor, convolution: nn.Module) -> Tensor:
    """A padded 3x3 convolution of x at twice its size, each value four times: a transposed 4x4 one of stride 2.

    x (B, C, H, W) -> (B, D, 2H, 2W).
    """
    if not _may_be_fused(convolution):
        y: Tensor = convolution(F.interpolate(x, scale_factor=2.0))
        return y
    weight, bias = cast(Tensor, convolution.weight), cast("Tensor | None", convolution.bias)
    return F.conv_transpose2d(x, _widened(weight).flip(2, 3).transpose(0, 1), bias, stride=2, padding=1)
