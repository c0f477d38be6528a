"""The latent, projections, layers under autocast, and training steps of models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastgen.nn
from benchmarks.shapes import LATENT_SHAPES, PROJECTION_SHAPES
from benchmarks.suites.bench_models import make as make_models
from benchmarks.suites.bench_models import trainer
from benchmarks.targets.row import Call, Row
from fastgen.bench.cases import Conv1x1SelfAttention, eager_latent
from fastgen.functional import qkv_projection, reparameterize_kl
from fastgen.nn import SelfAttention2d

HALVES = (torch.bfloat16, torch.float16)


def named(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"


def latent_rows() -> list[Row]:
    wide, small = LATENT_SHAPES["wide"], (512, 1024)
    chosen = [(wide, torch.float32, 10.0, 6.0), *((small, dtype, 1.0, 1.0) for dtype in HALVES)]
    rows = []
    for size, dtype, *targets in chosen:
        for backward, target in enumerate(targets):

            def make(size: tuple[int, ...] = size, dtype: torch.dtype = dtype, backward: int = backward) -> Any:
                torch.manual_seed(0)
                mu, logvar = (torch.randn(size).to(dtype).requires_grad_(bool(backward)) for _ in range(2))
                upstream = torch.randn(size).to(dtype), torch.randn(size[0])

                def call(function: Callable[..., Any]) -> Call:
                    def step() -> Any:
                        z, kl = function(mu, logvar)
                        return torch.autograd.grad((z, kl), (mu, logvar), (upstream[0], upstream[1].to(kl.dtype)))

                    return step if backward else lambda: function(mu, logvar)

                return call(reparameterize_kl), call(eager_latent)

            passes = "forward + backward" if backward else "forward"
            rows.append(Row(f"reparameterize_kl, {passes}", f"{size}{named(dtype)}", "the eager formula", target, make))
    return rows


def projection_rows() -> list[Row]:
    batch, length, channels, heads, dims = 4, 256, *PROJECTION_SHAPES["char-lm"][2:]
    rows = []
    for dtype in (torch.float32, *HALVES):
        for backward in (False, True):

            def make(dtype: torch.dtype = dtype, backward: bool = backward) -> tuple[Call, Call]:
                torch.manual_seed(0)
                outputs = sum(h * d for h, d in zip(heads, dims, strict=True))
                x, weight, bias = torch.randn(batch, length, channels), torch.randn(outputs, channels) / 16, None
                x, weight = (tensor.to(dtype).requires_grad_(backward) for tensor in (x, weight))
                bias = torch.randn(outputs).to(dtype).requires_grad_(backward)
                upstream = torch.randn(3, batch, heads[0], length, dims[0]).to(dtype).unbind(0)

                def ours() -> Any:
                    return qkv_projection(x, weight, bias, heads=heads, head_dims=dims)

                def theirs() -> Any:
                    parts = F.linear(x, weight, bias).view(batch, length, 3, heads[0], dims[0])
                    return parts.permute(2, 0, 3, 1, 4).unbind(0)

                def call(function: Callable[[], Any]) -> Call:
                    if not backward:
                        return function
                    return lambda: torch.autograd.grad(function(), (x, weight, bias), upstream)

                return call(ours), call(theirs)

            passes = "forward + backward" if backward else "forward"
            shape = f"{(batch, length, channels)}{named(dtype)}"
            rows.append(Row(f"qkv_projection, {passes}", shape, "F.linear + view", 1.0, make))
    return rows


def layer_rows() -> list[Row]:
    """Training steps under autocast to bfloat16."""

    def step(layer: nn.Module, x: Tensor, upstream: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        return torch.autograd.grad(out, [x, *layer.parameters()], upstream.to(out.dtype))

    def calls(ours: nn.Module, theirs: nn.Module, *size: int) -> tuple[Call, Call]:
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        x, upstream = torch.randn(size).requires_grad_(), torch.randn(size)
        return (lambda: step(ours, x, upstream)), (lambda: step(theirs, x, upstream))

    def encoder() -> tuple[Call, Call]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"dropout": 0.0, "batch_first": True}
        ours = fastgen.nn.TransformerEncoderLayer(384, 6, 1536, **options)
        return calls(ours, nn.TransformerEncoderLayer(384, 6, 1536, **options), 4, 256, 384)

    def image() -> tuple[Call, Call]:
        torch.manual_seed(0)
        ours = SelfAttention2d(64)
        nn.init.ones_(ours.gamma)  # initialized to 0, where the layer is the identity
        return calls(ours, Conv1x1SelfAttention(64), 4, 64, 32, 32)

    return [
        Row("TransformerEncoderLayer, training step", "(4, 256, 384), autocast to bfloat16", "torch's", 1.0, encoder),
        Row("SelfAttention2d, training step", "(4, 64, 32, 32), autocast to bfloat16", "1x1 convolutions", 1.0, image),
    ]


def model_rows() -> list[Row]:
    rows = []
    for name in ("conv-vae", "dcgan", "conv-vae 28x28", "dcgan 28x28"):

        def make(name: str = name) -> tuple[Call, Call]:
            ours, twin, batch, steps = make_models(name)
            return trainer(ours, ours, batch, steps), trainer(twin, ours, batch, steps)

        model, _, size = name.partition(" ")
        rows.append(Row(f"{model}, training", size or "defaults, 8x8", "plain PyTorch", 1.0, make))
    return rows
