"""``transformer-lm`` in plain PyTorch: F.scaled_dot_product_attention, RoPE, F.rms_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (B, H, N, D): channels i and i + D / 2 are a pair."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_dim
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(config.head_dim))
        self.key_norm = nn.Parameter(torch.ones(config.head_dim))
        self.merge = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, self.head_dim)
        query, key, value = (
            part.view(shape).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        query = rotate(F.rms_norm(query, (self.head_dim,), self.query_norm, 1e-6), cos, sin)
        key = rotate(F.rms_norm(key, (self.head_dim,), self.key_norm, 1e-6), cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class TransformerLMTwin(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(config.vocabulary), config.width)
        self.decoder = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        frequencies = 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.outer(torch.arange(config.context), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, length = self.embedding(tokens), tokens.size(1)
        for block in self.decoder:
            x = block(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, phase, batch, context) -> dict[str, Tensor]:
        tokens = batch["tokens"]
        return {"loss": F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())}
