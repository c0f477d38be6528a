"""Layers that hold parameters and call ``fastgen.functional``."""

from __future__ import annotations

from fastgen.nn.cache import KVCache
from fastgen.nn.image import AttentionBlock2d, AttentionGate2d, SelfAttention2d
from fastgen.nn.latent import GaussianLatent
from fastgen.nn.position import PositionalEncoding, RelativePositionBias, RotaryEmbedding
from fastgen.nn.window import WindowAttention2d

__all__ = [
    "AttentionBlock2d",
    "AttentionGate2d",
    "GaussianLatent",
    "KVCache",
    "PositionalEncoding",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SelfAttention2d",
    "WindowAttention2d",
]
