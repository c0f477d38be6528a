"""(Shifted) window attention of the Swin Transformer."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import checks as check
from fastgen import functional
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._checks import require_divisible, require_feature_map
from fastgen.nn._state_dict import StateDictRemapping
from fastgen.nn._sublayers import is_pointwise, map_channels, weight_and_bias

__all__ = ["WindowAttention2d"]

_Linear: TypeAlias = tuple[Tensor, Tensor | None]
"""Weight and bias."""


class _Run(NamedTuple):
    """Adjacent windows along one side with the same mask: positions start to stop of the padded, rolled side."""

    start: int
    stop: int
    uniform: bool


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in pair):
        raise ValueError(f"{name}: expected an integer >= {least} or a pair of them, got {value!r}")
    return pair[0], pair[1]


def _region(position: int, length: int, padded: int, shift: int) -> int:
    """Region of a position of a side that was rolled by ``shift``: 0, 1 if it wrapped around, -1 for padding."""
    return -1 if (position + shift) % padded >= length else int(position + shift >= padded)


def _runs(length: int, window: int, padded: int, shift: int) -> list[_Run]:
    regions = [_region(position, length, padded, shift) for position in range(padded)]
    windows = [(start, regions[start : start + window]) for start in range(0, padded, window)]
    runs = []
    for pattern, group in itertools.groupby(windows, key=lambda entry: entry[1]):
        starts = [start for start, _ in group]
        runs.append(_Run(starts[0], starts[-1] + window, len(set(pattern)) == 1 and pattern[0] >= 0))
    return runs


def _regions(run: _Run, length: int, window: int, padded: int, shift: int, device: torch.device) -> Tensor:
    """``_region`` of the positions of the run's first window, computed on the device."""
    position = torch.arange(run.start, run.start + window, device=device) + shift
    return torch.where(position % padded >= length, -1, (position >= padded).long())


def _attention_mask(rows: Tensor, columns: Tensor) -> Tensor:
    """(h w, h w), True where both positions are in the same region along both sides and the key is not padding."""
    same = (rows[:, None, None, None] == rows[:, None]) & (columns[:, None, None] == columns)
    return (same & (rows[:, None] >= 0) & (columns >= 0)).flatten(2, 3).flatten(0, 1)


class WindowAttention2d(ComputedBuffers, StateDictRemapping):
    """Self-attention within (shifted) windows, with a learned relative position bias.

    Liu et al., "Swin Transformer: hierarchical vision Transformer using shifted windows" (2021), section 3.2 and
    equation 4. H and W are arbitrary: a side that is not a multiple of the window size is padded at the bottom or on
    the right, and the padding is masked. (torchvision's layer pads with zeros that are attended to.)

    The projections are fused with the attention. A projection that has hooks or is not a plain ``nn.Linear`` is called
    once, with (B, H * W, C).

    State dicts have the keys of torchvision's and the authors' layers: ``qkv`` (3C, C), ``proj`` (C, C) and
    ``relative_position_bias_table`` ((2h - 1)(2w - 1), num_heads). An entry ``relative_position_index`` is ignored.

    Shapes:
        - Input: (B, C, H, W).
        - Output: (B, C, H, W).

    Args:
        channels: number of channels C.
        num_heads: number of heads, a divisor of ``channels``.
        window_size: height and width of a window, or one number for both.
        shift: cyclic shift of the windows down and right; half the window size in every second layer of the paper.
            Positions that are adjacent only because of the cyclic shift do not attend to each other. A side that is
            covered by a single window is not shifted, as in the authors' code.
        bias: whether the two projections have biases.

    Raises:
        ValueError: if ``num_heads`` does not divide ``channels``, a size is not positive, or the shift is not smaller
            than the window.

    Example:
        >>> WindowAttention2d(32, 4, 7, shift=3)(torch.randn(2, 32, 14, 20)).shape
        torch.Size([2, 32, 14, 20])
    """

    relative_position_index: Tensor

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int | tuple[int, int],
        *,
        shift: int | tuple[int, int] = 0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_divisible("channels", channels, "num_heads", num_heads)
        self.channels, self.num_heads = channels, num_heads
        self.window_size, self.shift = _pair("window_size", window_size, 1), _pair("shift", shift, 0)
        if any(moved >= size for moved, size in zip(self.shift, self.window_size, strict=True)):
            raise ValueError(f"shift: expected less than window_size = {self.window_size}, got {self.shift}")
        height, width = self.window_size
        self.qkv = nn.Linear(channels, 3 * channels, bias, device=device, dtype=dtype)
        self.proj = nn.Linear(channels, channels, bias, device=device, dtype=dtype)
        table = torch.empty((2 * height - 1) * (2 * width - 1), num_heads, device=device, dtype=dtype)
        if check.has_data(table):  # truncation draws again until every value fits
            nn.init.trunc_normal_(table, std=0.02)
        self.relative_position_bias_table = nn.Parameter(table)
        self._register_computed(device)

    def _computed(self) -> dict[str, Tensor]:
        height, width = self.window_size
        down, right = torch.arange(height), torch.arange(width)
        down = down[:, None, None, None] - down[:, None] + height - 1
        right = right[:, None, None] - right + width - 1
        return {"relative_position_index": (down * (2 * width - 1) + right).flatten(2, 3).flatten(0, 1)}

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.num_heads}, window_size={self.window_size}, shift={self.shift}"

    def relative_position_bias(self) -> Tensor:
        """Bias (num_heads, h w, h w) that is added to the scores of query i and key j of a window."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Applies window attention to a feature map.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, C, H, W).

        Raises:
            TypeError: if x is not a floating-point tensor, or its dtype differs from the dtype of the weights.
            ValueError: if x has the wrong shape, or an empty side.
        """
        require_feature_map(x, self.channels)
        sides = tuple(x.shape[2:])
        if 0 in sides:
            raise ValueError(f"x: expected height and width of at least 1, got {check.shape_of(x)}")
        padded = [-(-side // size) * size for side, size in zip(sides, self.window_size, strict=True)]
        shift = [
            moved if size < side else 0 for moved, size, side in zip(self.shift, self.window_size, padded, strict=True)
        ]
        qkv, proj = (weight_and_bias(layer) if is_pointwise(layer) else None for layer in (self.qkv, self.proj))
        if qkv is None:  # not fusible: called once, for all windows
            x = map_channels(self, "qkv", x, 3 * self.channels)
        padded_x = F.pad(x, (0, padded[1] - sides[1], 0, padded[0] - sides[0]))
        rolled = padded_x.roll([-moved for moved in shift], (2, 3)) if any(shift) else padded_x
        out = self._attend_in_runs(rolled, sides, padded, shift, qkv, proj)
        out = out.roll(shift, (2, 3)) if any(shift) else out
        out = out[:, :, : sides[0], : sides[1]]
        return out if proj is not None else map_channels(self, "proj", out, self.channels)

    def _attend_in_runs(
        self,
        x: Tensor,
        sides: tuple[int, ...],
        padded: list[int],
        shift: list[int],
        qkv: _Linear | None,
        proj: _Linear | None,
    ) -> Tensor:
        """Processes windows with the same mask together, so that no mask is repeated over the batch or the windows."""
        down, right = zip(sides, self.window_size, padded, shift, strict=True)
        bias = self.relative_position_bias()
        stripes = []
        for rows in _runs(*down):
            parts = []
            for columns in _runs(*right):
                mask = bias
                if not (rows.uniform and columns.uniform):
                    row_regions = _regions(rows, *down, x.device)
                    column_regions = _regions(columns, *right, x.device)
                    mask = bias.masked_fill(~_attention_mask(row_regions, column_regions), -math.inf)
                part = x[:, :, rows.start : rows.stop, columns.start : columns.stop]
                parts.append(self._attend(part, mask, qkv, proj))
            stripes.append(torch.cat(parts, dim=3) if len(parts) > 1 else parts[0])
        return torch.cat(stripes, dim=2) if len(stripes) > 1 else stripes[0]

    def _attend(self, x: Tensor, mask: Tensor, qkv: _Linear | None, proj: _Linear | None) -> Tensor:
        """Attention of windows with the same mask, which are folded into the batch: (B, C, h, w) -> (B, C, h, w).

        If ``qkv`` is None, x is already projected, (B, 3C, h, w). If ``proj`` is None, the heads are concatenated only.
        """
        (height, width), heads, channels = self.window_size, self.num_heads, self.channels
        batch, _, rows, columns = x.shape
        windows = x.unflatten(3, (columns // width, width)).unflatten(2, (rows // height, height))
        tokens = windows.permute(0, 2, 4, 3, 5, 1).reshape(-1, height * width, x.size(1))
        if qkv is None:
            query, key, value = tokens.unflatten(2, (3, heads, channels // heads)).permute(2, 0, 3, 1, 4)
        else:
            dims = (channels // heads,) * 3
            query, key, value = functional.qkv_projection(tokens, *qkv, heads=(heads,) * 3, head_dims=dims)
        out = cast(Tensor, functional.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        merged = out.transpose(1, 2) if proj is None else functional.merge_heads_projection(out, *proj)
        grid = merged.reshape(batch, rows // height, columns // width, height, width, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows, columns)

    def _remap_state_dict(self, state_dict: dict[str, Any], prefix: str) -> None:
        state_dict.pop(f"{prefix}relative_position_index", None)
        super()._remap_state_dict(state_dict, prefix)
