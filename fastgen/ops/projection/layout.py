"""How a projection's channels are divided into parts and heads, and how tokens lie in memory."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Packed parts of a projection: ``heads[i]`` heads of ``head_dims[i]`` channels each.

    ``channels_first``: x is (B, C, N). ``allow_tf32``: CUDA kernels may multiply float32 in tf32.
    """

    heads: list[int]
    head_dims: list[int]
    channels_first: bool
    allow_tf32: bool = False


def length_first(tokens: Tensor) -> bool:
    """Whether (B, N, C) lies in memory as (N, B, C)."""
    return not tokens.is_contiguous() and tokens.transpose(0, 1).is_contiguous()


def to_tokens(x: Tensor, channels_first: bool) -> Tensor:
    """(B, N, C), a view, from that or from (B, C, N)."""
    return x.transpose(1, 2) if channels_first else x


def split_heads(y: Tensor, layout: Layout) -> list[Tensor]:
    """(B, N, sum of heads * head_dims) -> one (B, H, N, D) view for each part."""
    sizes = list(zip(layout.heads, layout.head_dims, strict=True))
    parts = y.split([h * d for h, d in sizes], dim=-1)
    return [part.unflatten(-1, size).transpose(1, 2) for part, size in zip(parts, sizes, strict=True)]


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), x.size(1) * x.size(3))
