"""Projections against a linear layer followed by the usual reshapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import PROJECTION_SHAPES
from fastgen.functional import qkv_projection
from fastgen.reference import split_heads


@pytest.mark.parametrize("name", PROJECTION_SHAPES)
def test_qkv_projection_with_backward(against, device, name):
    batch, length, channels, heads, dims = PROJECTION_SHAPES[name]
    torch.manual_seed(0)
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    x = torch.randn(batch, length, channels, device=device, requires_grad=True)
    weight = torch.randn(rows, channels, device=device, requires_grad=True)
    bias = torch.randn(rows, device=device, requires_grad=True)
    upstream = [torch.randn(batch, h, length, d, device=device) for h, d in zip(heads, dims, strict=True)]

    def ours():
        parts = qkv_projection(x, weight, bias, heads=heads, head_dims=dims)
        return torch.autograd.grad(parts, (x, weight, bias), upstream)

    def linear():
        parts = split_heads(F.linear(x, weight, bias), list(heads), list(dims))
        return torch.autograd.grad(parts, (x, weight, bias), upstream)

    against(ours, {"linear + views": linear}, flops=6 * batch * length * channels * rows)


def test_feature_map_to_heads(against, device):
    torch.manual_seed(0)
    x = torch.randn(4, 64, 32, 32, device=device)
    weight = torch.randn(48, 64, device=device)

    def convolution():
        y = F.conv2d(x, weight[:, :, None, None]).flatten(2).transpose(1, 2)
        return [part.contiguous() for part in split_heads(y, [1, 1, 1], [8, 8, 32])]

    against(
        lambda: qkv_projection(x, weight, heads=(1, 1, 1), head_dims=(8, 8, 32), channels_first=True),
        {"1x1 convolution + permute": convolution},
    )
