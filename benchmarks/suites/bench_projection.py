"""Projections with fused epilogues against plain PyTorch: reshapes, bias, QK-norm, RoPE, residual and gate.

On a GPU, full sizes are used, and fastgen's default implementation is compared with its compiled kernels, PyTorch and
torch.compile.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastgen
from benchmarks.shapes import PROJECTION_SHAPES, PROJECTION_SIZES
from fastgen.functional import merge_heads_projection, qkv_projection, rotary_embedding
from fastgen.reference import join_heads, split_heads


def sizes(name, device):
    batch, length, *rest = PROJECTION_SHAPES[name]
    return (*(PROJECTION_SIZES.get(name, (batch, length)) if device.type == "cuda" else (batch, length)), *rest)


def leaves(device, *shapes):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(function, tensors):
    """A function that runs forward and backward with fixed output gradients."""
    with torch.no_grad():
        outputs = function(*tensors)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    upstream = [torch.randn_like(y) for y in outputs]

    def step(function=function):
        y = function(*tensors)
        return torch.autograd.grad([y] if isinstance(y, torch.Tensor) else y, tensors, upstream)

    return step


def compare(against, device, ours, plain, tensors, **counted):
    step = gradients(plain, tensors)
    peers = {"PyTorch": step}
    if device.type == "cuda":
        compiled = torch.compile(plain)

        def kernels():
            with fastgen.use_backend("compiled"):
                return step(ours)

        peers |= {"torch.compile": lambda: step(compiled), "compiled kernels": kernels}
    against(lambda: step(ours), peers, **counted)


@pytest.mark.parametrize("epilogue", ["plain", "QK-norm and RoPE"])
@pytest.mark.parametrize("name", PROJECTION_SHAPES)
def test_qkv_training_step(against, device, name, epilogue):
    batch, length, channels, heads, dims = sizes(name, device)
    if device.type == "cuda" and name == "odd":
        pytest.skip("not supported by the kernels")
    if epilogue != "plain" and dims[0] % 2:
        pytest.skip("RoPE requires an even head dim")
    rows = sum(h * d for h, d in zip(heads, dims, strict=True))
    shapes = [(batch, length, channels), (rows, channels), (rows,)]
    options = {}
    if epilogue != "plain":
        shapes += [(dims[0],), (dims[1],)]
        angles = torch.arange(length, device=device)[:, None] / 100 ** torch.linspace(0, 1, dims[0] // 2, device=device)
        options["rotary"] = angles.cos(), angles.sin()
    tensors = leaves(device, *shapes)

    def ours(x, weight, bias, *norms):
        return qkv_projection(x, weight, bias, heads=heads, head_dims=dims, norms=norms, **options)

    def plain(x, weight, bias, *norms):
        parts = split_heads(F.linear(x, weight, bias), list(heads), list(dims))
        for i, norm in enumerate(norms):
            parts[i] = rotary_embedding(F.rms_norm(parts[i], norm.shape, norm, 1e-6), *options["rotary"])
        return parts

    compare(against, device, ours, plain, tensors, flops=6 * batch * length * channels * rows)


@pytest.mark.parametrize("name", ["sagan-64", "dit-xl", "char-lm"])
def test_merge_training_step(against, device, name):
    """With bias, residual and gate."""
    batch, length, channels, heads, dims = sizes(name, device)
    width = heads[-1] * dims[-1]
    shapes = [(batch, heads[-1], length, dims[-1]), (channels, width), (channels,), (batch, length, channels), (1,)]
    tensors = leaves(device, *shapes)

    def ours(x, weight, bias, residual, gate):
        return merge_heads_projection(x, weight, bias, residual=residual, gate=gate)

    def plain(x, weight, bias, residual, gate):
        return residual + gate * F.linear(join_heads(x), weight, bias)

    compare(against, device, ours, plain, tensors, flops=6 * batch * length * channels * width)


def test_feature_map_to_heads_and_back(against, device):
    """Projections of SAGAN's attention: 1x1 convolutions and the conversion to the layout of attention."""
    batch = 64 if device.type == "cuda" else 4
    shapes = [(batch, 64, 32, 32), (48, 64), (64, 32), (1,)]
    tensors = leaves(device, *shapes)

    def ours(x, weight, out, gate):
        q, k, v = qkv_projection(x, weight, heads=(1, 1, 1), head_dims=(8, 8, 32), channels_first=True)
        return q, k, merge_heads_projection(v, out, residual=x, gate=gate, channels_first=True)

    def plain(x, weight, out, gate):
        y = F.conv2d(x, weight[:, :, None, None]).flatten(2).transpose(1, 2)
        q, k, v = (part.contiguous() for part in split_heads(y, [1, 1, 1], [8, 8, 32]))
        back = v.squeeze(1).transpose(1, 2).reshape(x.size(0), 32, *x.shape[2:])
        return q, k, x + gate * F.conv2d(back, out[:, :, None, None])

    compare(against, device, ours, plain, tensors)
