"""A small call of each public function and layer, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen import functional as F
from fastgen import nn as layers

Make = Callable[..., Tensor]


def _packed(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """One sequence, whose begin and end are values of a tensor."""
    with torch._C.DisableTorchFunction():
        ends = [torch.arange(2, device=query.device) * t.size(0) for t in (query, key)]
    return F.varlen_attention(query, key, value, ends[0], ends[1], dropout_p=0.1, enable_gqa=True, return_lse=True)


FUNCTIONS: dict[str, Callable[[Make], Any]] = {
    "scaled_dot_product_attention": lambda make: F.scaled_dot_product_attention(
        make(1, 2, 5, 8), make(1, 2, 7, 8), make(1, 2, 7, 8), make(5, 7), 0.1, softcap=2.0, return_lse=True
    ),
    "scaled_dot_product_attention_jvp": lambda make: F.scaled_dot_product_attention_jvp(
        (make(1, 2, 5, 8), make(1, 2, 7, 8), make(1, 2, 7, 8)), (make(1, 2, 5, 8), None, make(1, 2, 7, 8)), make(5, 7),
        attn_mask_tangent=make(5, 7), return_lse=True,
    ),
    "varlen_attention": lambda make: _packed(make(5, 4, 8), make(7, 2, 8), make(7, 2, 8)),
    "multi_head_projection": lambda make: F.multi_head_projection(make(2, 3, 8), make(16, 8), make(16), num_heads=2),
    "qkv_projection": lambda make: F.qkv_projection(
        make(2, 3, 8), make(48, 8), make(48), heads=(2, 2, 2), head_dims=(8, 8, 8), norms=(make(8), make(8)),
        rotary=(make(3, 4, grad=False), make(3, 4, grad=False)),
    ),
    "merge_heads_projection": lambda make: F.merge_heads_projection(
        make(2, 2, 3, 8), make(8, 16), make(8), residual=make(2, 3, 8), gate=make(2, 8)
    ),
    "reparameterize": lambda make: F.reparameterize(make(2, 8), make(2, 8)),
    "reparameterize_kl": lambda make: F.reparameterize_kl(make(2, 8), make(2, 8), prior_mu=make(8)),
    "rotary_embedding": lambda make: F.rotary_embedding(make(1, 2, 3, 8), make(3, 4), make(3, 4)),
}  # fmt: skip

Layer = tuple[Callable[[], torch.nn.Module], Callable[[Any, Make], Any]]

LAYERS: dict[str, Layer] = {
    "MultiheadAttention": (
        lambda: layers.MultiheadAttention(8, 2, batch_first=True),
        lambda layer, make: layer(*[make(2, 3, 8)] * 3, key_padding_mask=make(2, 3, dtype=torch.bool))[0],
    ),
    "TransformerEncoderLayer": (
        lambda: layers.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        lambda layer, make: layer(make(2, 3, 8)),
    ),
    "TransformerEncoder": (
        lambda: layers.TransformerEncoder(layers.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1).eval(),
        lambda layer, make: layer.requires_grad_(False)(
            make(2, 3, 8, grad=False), src_key_padding_mask=make(2, 3, dtype=torch.bool)
        ),
    ),
    "TransformerDecoderLayer": (
        lambda: layers.TransformerDecoderLayer(8, 2, 8),
        lambda layer, make: layer(make(3, 2, 8), make(4, 2, 8)),
    ),
    "TransformerDecoder": (
        lambda: layers.TransformerDecoder(layers.TransformerDecoderLayer(8, 2, 8), 1),
        lambda layer, make: layer(make(3, 2, 8), make(4, 2, 8), tgt_mask=make(3, 3, grad=False)),
    ),
    "Transformer": (
        lambda: layers.Transformer(8, 2, 1, 1, 8),
        lambda layer, make: layer(make(3, 2, 8), make(3, 2, 8), tgt_mask=make(3, 3)),
    ),
    "SelfAttention2d": (
        lambda: layers.SelfAttention2d(32, pool=2),
        lambda layer, make: layer(make(2, 32, 4, 4)),
    ),
    "AttentionBlock2d": (
        lambda: layers.AttentionBlock2d(8, num_groups=2),
        lambda layer, make: layer(make(2, 8, 4, 4)),
    ),
    "AttentionGate2d": (lambda: layers.AttentionGate2d(8, stride=2), lambda layer, make: layer(make(2, 8, 4, 4))),
    "WindowAttention2d": (
        lambda: layers.WindowAttention2d(8, 2, 3, shift=1),
        lambda layer, make: layer(make(2, 8, 7, 4)),
    ),
    "PositionalEncoding": (
        lambda: layers.PositionalEncoding(8, 7),
        lambda layer, make: layer(make(2, 3, 8), positions=make(3, dtype=torch.int64)),
    ),
    "RotaryEmbedding": (
        lambda: layers.RotaryEmbedding(8),
        lambda layer, make: layer(make(2, 2, 3, 8), make(2, 2, 3, 8)),
    ),
    "RelativePositionBias": (lambda: layers.RelativePositionBias(4), lambda layer, make: layer(5, 7)),
    "KVCache": (
        lambda: layers.KVCache(2, 2, 4, 3),
        lambda layer, make: (
            layer.reset(make(2, dtype=torch.int64))
            or layer.update(make(2, 2, 3, 3, grad=False), make(2, 2, 3, 3, grad=False))[0]
        ),
    ),
    "GaussianLatent": (layers.GaussianLatent, lambda layer, make: layer(make(2, 8, 3))),
    "LSTM": (lambda: layers.LSTM(3, 4, 2), lambda layer, make: layer(make(5, 2, 3))[0]),
    "GRU": (lambda: layers.GRU(3, 4, bidirectional=True), lambda layer, make: layer(make(5, 2, 3))[0]),
}


CASES: dict[str, Callable[[Make], Any]] = {
    **{f"functional.{name}": call for name, call in FUNCTIONS.items()},
    **{
        f"nn.{name}": lambda make, make_layer=make_layer, call=call: call(make_layer(), make)  # type: ignore[misc]
        for name, (make_layer, call) in LAYERS.items()
    },
}
"""Names, and functions of ``make(*sizes, dtype=None, grad=True)``, which makes a tensor. Parameters
of layers are made on the default device."""


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in the result of a call."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)] if isinstance(result, (tuple, list)) else []
