"""Layers (``torch.nn.Module``) built on ``fastgen.functional``."""

from __future__ import annotations

from fastgen.functional._overrides import refuse_script
from fastgen.nn.attention import MultiheadAttention
from fastgen.nn.cache import KVCache
from fastgen.nn.image import AttentionBlock2d, AttentionGate2d, SelfAttention2d
from fastgen.nn.latent import GaussianLatent
from fastgen.nn.positional_encoding import PositionalEncoding
from fastgen.nn.recurrent import GRU, LSTM
from fastgen.nn.relative_position import RelativePositionBias
from fastgen.nn.rotary import RotaryEmbedding
from fastgen.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from fastgen.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastgen.nn.window import WindowAttention2d

__all__ = [
    "GRU",
    "LSTM",
    "AttentionBlock2d",
    "AttentionGate2d",
    "GaussianLatent",
    "KVCache",
    "MultiheadAttention",
    "PositionalEncoding",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SelfAttention2d",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "WindowAttention2d",
]

for _name in __all__:
    refuse_script(globals()[_name])
