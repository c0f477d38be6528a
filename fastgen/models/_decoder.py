"""The block of decoder-only Transformers, its initial weights, and the caches of its keys and values."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.nn import KVCache


class DecoderConfig(Protocol):
    """What a block has to know: of a token, of attention, of the mlp."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def normalise_heads(self) -> bool: ...
    @property
    def dropout(self) -> float: ...


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_dim
        self.heads, self.head_dim, self.dropout = config.heads, config.head_dim, config.dropout
        self.gated = config.activation == "swiglu"
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(self.head_dim)) if config.normalise_heads else None
        self.key_norm = nn.Parameter(torch.ones(self.head_dim)) if config.normalise_heads else None
        self.merge = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, hidden * (2 if self.gated else 1), bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None = None) -> Tensor:
        """x (B, N, width) -> the same. ``rotary``: tables of its positions. ``cache``: of the tokens before x."""
        query, key, value = functional.qkv_projection(
            self.attention_norm(x),
            self.qkv.weight,
            heads=(self.heads,) * 3,
            head_dims=(self.head_dim,) * 3,
            norms=() if self.query_norm is None or self.key_norm is None else (self.query_norm, self.key_norm),
            rotary=rotary,
        )
        p = self.dropout if self.training else 0.0
        if cache is None:
            heads = functional.scaled_dot_product_attention(query, key, value, dropout_p=p, is_causal=True)
        else:
            keys, values, mask = cache.update(key, value)
            heads = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        heads = cast(Tensor, heads)
        if p:
            x = x + F.dropout(functional.merge_heads_projection(heads, self.merge.weight), p)
        else:
            x = functional.merge_heads_projection(heads, self.merge.weight, residual=x)
        hidden = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * hidden
        else:
            hidden = F.gelu(hidden)
        branch: Tensor = self.mlp_out(hidden)
        return x + (F.dropout(branch, p) if p else branch)


def initialise_decoder(model: nn.Module, config: DecoderConfig) -> None:
    """Matrices from N(0, 1 / width); what is added to the residual stream is smaller by the root of how often it is."""
    std = config.width**-0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            added = name.endswith(("merge.weight", "mlp_out.weight"))
            nn.init.normal_(parameter, std=std * (2 * config.depth) ** -0.5 if added else std)


def new_caches(config: DecoderConfig, batch: int, length: int, like: Tensor) -> list[KVCache]:
    """One for each block, of ``length`` tokens; of ``like``'s device, and its dtype or that of autocast."""
    device = like.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else like.dtype
    return [
        KVCache(batch, config.heads, length, config.head_dim, device=device, dtype=dtype) for _ in range(config.depth)
    ]
