"""Attention of torchvision's Swin Transformers, V1 and V2, which compute the softmax themselves.

Their attention layers have a ``forward`` of their own here. It replaces the versions that it was compared with.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.integrations import _function_mode as mode
from fastgen.integrations import redirected
from fastgen.integrations._calls import fingerprint
from fastgen.integrations._windows import cosine_heads, window_attention
from fastgen.integrations.modules import AccelerationReport, is_of_library, qualified_name
from fastgen.integrations.redirected import Choice

__all__ = ["accelerate", "check_restore", "recognizes", "restore"]

_MODULE = "torchvision.models.swin_transformer"

_KNOWN: dict[str, tuple[str, ...]] = {
    "ShiftedWindowAttention": ("7b138d7df367e406",),
    "ShiftedWindowAttentionV2": ("38c5ae614489a46d",),
    "shifted_window_attention": ("4358a511bee8bc47",),
}
"""Fingerprints of the two classes' ``forward`` and of the function that they call."""


def recognizes(model: nn.Module) -> bool:
    return any(is_of_library(module, "torchvision") for module in model.modules())


def accelerate(model: nn.Module) -> AccelerationReport:
    """Replaces the window attention of Swin Transformers. Other attention layers are kept, with the reason."""
    return redirected.redirect_chosen(
        model, lambda module: _choice(module) if is_of_library(module, "torchvision") else None
    )


restore = redirected.restore
check_restore = redirected.check_restore


def _choice(module: nn.Module) -> Choice:
    cls = mode.original_class(type(module))
    if cls.__module__ != _MODULE or cls.__name__ not in _KNOWN:
        return redirected.choice_of(module)
    function = "shifted_window_attention"
    found = {cls.__name__: cls.forward, function: getattr(sys.modules[_MODULE], function, None)}
    if all(fingerprint(code) in _KNOWN[name] for name, code in found.items()):
        return mode.Variant(_forward)
    return f"{qualified_name(cls)} differs from the versions that fastgen knows"


def _forward(self: Any, x: Tensor) -> Tensor:
    """``forward`` of both classes: (B, H, W, C) -> (B, H, W, C)."""
    batch, height, width, channels = x.shape
    rows, columns = self.window_size
    padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
    sides = padded.shape[1:3]
    # A side that one window covers is not shifted.
    shift = [0 if size >= side else s for s, size, side in zip(self.shift_size, (rows, columns), sides, strict=True)]
    shifted = any(shift)
    if shifted:
        padded = padded.roll([-s for s in shift], (1, 2))
    grid = (sides[0] // rows, sides[1] // columns)
    windows = padded.view(batch, grid[0], rows, grid[1], columns, channels)
    windows = windows.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, channels)

    query, key, value, scale = _heads(self, windows)
    out = window_attention(
        query,
        key,
        value,
        self.get_relative_position_bias()[0],
        _mask(windows, grid, (rows, columns), shift) if shifted else None,
        dropout_p=self.attention_dropout if self.training else 0.0,
        scale=scale,
    )
    out = F.linear(out.transpose(1, 2).reshape(windows.shape), self.proj.weight, self.proj.bias)
    out = F.dropout(out, self.dropout, self.training)

    out = out.view(batch, *grid, rows, columns, channels).permute(0, 1, 3, 2, 4, 5).reshape(padded.shape)
    if shifted:
        out = out.roll(shift, (1, 2))
    return out[:, :height, :width].contiguous()


def _heads(self: Any, windows: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys and values (B * W, H, N, D), and the factor of the scores."""
    head_dim = windows.size(-1) // self.num_heads
    temperature, bias = getattr(self, "logit_scale", None), self.qkv.bias
    if temperature is not None and bias is not None:  # V2 has no bias of the keys
        first, _, last = bias.chunk(3)
        bias = torch.cat([first, torch.zeros_like(first), last])
    qkv = F.linear(windows, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, head_dim))
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    if temperature is None:
        return query, key, value, head_dim**-0.5
    return *cosine_heads(query, key, temperature), value, 1.0


def _mask(windows: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: list[int]) -> Tensor:
    """(W, N, N): -100 between positions that are adjacent by the shift only."""
    regions = []
    for count, size, moved in zip(grid, window, shift, strict=True):
        position = torch.arange(count * size, device=windows.device)
        # As slices with negative bounds: without a shift, the last region begins at 0.
        last = position >= (count * size - moved) if moved else torch.ones_like(position, dtype=torch.bool)
        regions.append(torch.where(last, 2, (position >= (count - 1) * size).long()).view(count, size))
    both = 3 * regions[0][:, None, :, None] + regions[1][None, :, None, :]
    both = both.reshape(grid[0] * grid[1], -1)
    return torch.where(both[:, None] == both[:, :, None], 0.0, -100.0).to(windows.dtype)
