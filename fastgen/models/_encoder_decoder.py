"""Blocks of an encoder-decoder Transformer: the encoder's, the decoder's, and what the latter keeps between steps."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.nn import KVCache
from fastgen.nn._sublayers import merge_heads, project_heads

Tables = tuple[Tensor, Tensor]


class BlockCache:
    """What a block of the decoder keeps from step to step: keys and values of the target so far and of the memory."""

    def __init__(self, target: KVCache) -> None:
        self.target = target
        self.memory: tuple[Tensor, ...] = ()


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: width, heads, head_dim, mlp_width (0: 4 times the width) and dropout.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_width or 4 * config.width
        self.heads, self.head_dim, self.dropout = config.heads, config.head_dim, config.dropout
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, hidden, bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotary: Tables, visible: Tensor) -> Tensor:
        """x (B, S, width) -> the same. ``visible`` (B, 1, 1, S): which tokens are no padding."""
        query, key, value = self._heads(x, rotary)
        heads = functional.scaled_dot_product_attention(query, key, value, visible, self._p())
        return self._plus_mlp(self._plus(x, cast(Tensor, heads), "merge"))

    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    def _heads(self, x: Tensor, rotary: Tables) -> tuple[Tensor, ...]:
        heads, dims = (self.heads,) * 3, (self.head_dim,) * 3
        return project_heads(self, ("qkv",), self.attention_norm(x), heads=heads, head_dims=dims, rotary=rotary)

    def _plus(self, x: Tensor, heads: Tensor, merge: str) -> Tensor:
        if self._p():
            return x + F.dropout(merge_heads(self, merge, heads), self._p())
        return merge_heads(self, merge, heads, residual=x)

    def _plus_mlp(self, x: Tensor) -> Tensor:
        branch: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + F.dropout(branch, self._p())


class DecoderBlock(EncoderBlock):
    """x + attention to the target so far, x + attention to the memory, then x + mlp(norm(x))."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        width = config.width
        self.memory_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.memory_merge = nn.Linear(width, width, bias=False)

    def forward(  # type: ignore[override]
        self, x: Tensor, rotary: Tables, visible: Tensor, memory: Tensor, cache: BlockCache | None = None
    ) -> Tensor:
        """x (B, T, width) -> the same. ``memory`` (B, S, width), of which a ``cache`` keeps keys and values."""
        query, key, value = self._heads(x, rotary)
        if cache is None:
            heads = functional.scaled_dot_product_attention(query, key, value, None, self._p(), is_causal=True)
        else:
            keys, values, mask = cache.target.update(key, value)
            heads = functional.scaled_dot_product_attention(query, keys, values, mask)
        x = self._plus(x, cast(Tensor, heads), "merge")
        key_value = cache.memory if cache else ()
        if not key_value:
            dims = (self.head_dim,) * 2
            key_value = project_heads(self, ("key_value",), memory, heads=(self.heads,) * 2, head_dims=dims)
        if cache:
            cache.memory = key_value
        of_one = (self.head_dim,)
        (query,) = project_heads(self, ("query",), self.memory_norm(x), heads=(self.heads,), head_dims=of_one)
        key, value = key_value
        heads = functional.scaled_dot_product_attention(query, key, value, visible, self._p())
        return self._plus_mlp(self._plus(x, cast(Tensor, heads), "memory_merge"))
