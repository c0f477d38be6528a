"""Convolutions whose second derivatives cost what the first ones do, and those beside a change of size.

A convolution is linear in its input and in its weight, so that its derivatives are convolutions again, of three kinds:

    y = convolve(x, w)          dx = spread(dy, w)          dw = correlate(dy, x)

and each one's derivatives are the other two. PyTorch computes the second derivative in the weight, which gradient
penalties ask for, as a convolution with kernels as large as the images, at two to three times the cost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from fastgen._transforms import transforms_active

_Sizes = tuple[int, int]


def _backward(
    upstream: Tensor, x: Tensor, weight: Tensor, stride: _Sizes, padding: _Sizes, mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The gradients in x and in weight; what ``mask`` leaves out is undefined."""
    found = torch.ops.aten.convolution_backward(
        upstream, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1, (*mask, False)
    )
    return found[0], found[1]


class _Convolve(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes, ctx.weight_node = (stride, padding), weight.grad_fn
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # The slope at the images, of a penalty, asks for no gradient of weights: they need not be made.
        for_weight = wanted[1] and (ctx.weight_node is None or torch._C._will_engine_execute_node(ctx.weight_node))
        dx = _Spread.apply(upstream, weight, x, *ctx.sizes) if wanted[0] else None
        dw = _Correlate.apply(upstream, x, weight, *ctx.sizes) if for_weight else None
        return dx, dw, upstream.sum((0, 2, 3)) if wanted[2] else None, None, None


class _Spread(Function):
    """upstream, weight -> the gradient in x, of which only the shape is used."""

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, weight: Tensor, x: Tensor, stride: _Sizes, padding: _Sizes
    ) -> Tensor:
        ctx.save_for_backward(upstream, weight)
        ctx.sizes = (stride, padding)
        return _backward(upstream, x, weight, stride, padding, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        upstream, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        first = convolve(direction, weight, None, *ctx.sizes) if wanted[0] else None
        second = _Correlate.apply(upstream, direction, weight, *ctx.sizes) if wanted[1] else None
        return first, second, None, None, None


class _Correlate(Function):
    """upstream, x -> the gradient in weight, of which only the shape is used."""

    @staticmethod
    def forward(
        ctx: Any, upstream: Tensor, x: Tensor, weight: Tensor, stride: _Sizes, padding: _Sizes
    ) -> Tensor:
        ctx.save_for_backward(upstream, x)
        ctx.sizes = (stride, padding)
        return _backward(upstream, x, weight, stride, padding, (False, True))[1]

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        upstream, x = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        first = convolve(x, direction, None, *ctx.sizes) if wanted[0] else None
        second = _Spread.apply(upstream, direction, x, *ctx.sizes) if wanted[1] else None
        return first, second, None, None, None


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: _Sizes = (1, 1), padding: _Sizes = (0, 0)
) -> Tensor:
    """``F.conv2d``. Where a transform, a compiler or autocast is at work, and where one of x and weight stands still,
    it is PyTorch's own."""
    differentiated = torch.is_grad_enabled() and x.requires_grad and weight.requires_grad
    if not differentiated or torch.compiler.is_compiling() or transforms_active() or torch.is_autocast_enabled(x.device.type):
        return F.conv2d(x, weight, bias, stride, padding)
    if weight.is_leaf:
        weight = weight.view_as(weight)  # PyTorch can't say of a leaf whether its gradient is asked for
    out: Tensor = _Convolve.apply(x, weight, bias, stride, padding)
    return out


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` without groups, dilation or padding other than of zeros, computed by ``convolve``."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]


def _widened(weight: Tensor) -> Tensor:
    """Kernels (..., 3, 3) passed over by a square of four ones, (..., 4, 4)."""
    padded = F.pad(weight, (1, 1, 1, 1))
    rows = padded[..., 1:, :] + padded[..., :-1, :]
    return rows[..., 1:] + rows[..., :-1]


def convolve_then_halve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution, and means of 2x2 squares of what it gives: one 4x4 convolution of stride 2, at 4/9 the cost.

    x (B, C, 2H, 2W) -> (B, D, H, W).
    """
    return convolve(x, 0.25 * _widened(weight), bias, (2, 2), (1, 1))


def double_then_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of x at twice its size, each value four times: a transposed 4x4 one of stride 2, at 4/9 the cost.

    Karras et al., "Progressive growing of GANs" (2018), call it a fused scale. x (B, C, H, W) -> (B, D, 2H, 2W).
    """
    kernel = _widened(weight).flip(2, 3).transpose(0, 1)
    return F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
