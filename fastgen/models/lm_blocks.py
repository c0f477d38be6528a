"""Pre-norm Transformer blocks of autoregressive models, and their decoding with KV caches.

In this file: block, initial weights, cached decoding of many blocks, one token through one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.functional._autocast import autocast_dtype
from fastgen.nn import KVCache, RotaryEmbedding
from fastgen.nn._sublayers import is_fusible, is_pointwise, is_unhooked, merge_heads, project_heads

Tables = tuple[Tensor, Tensor]
"""cos and sin of rotary embeddings."""

EPS = 1e-6
RENAMED = {"heads": "num_heads", "normalise_heads": "qk_norm"}  # word-lint: ok
"""Old and new names of options that models of these blocks share."""


class LMBlock(nn.Module):
    """Pre-norm Transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: width, num_heads, head_dim, hidden_dim, activation, qk_norm and dropout.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_dim
        self.heads, self.head_dim, self.dropout = config.num_heads, config.head_dim, config.dropout
        self.gated = config.activation == "swiglu"
        self.attention_norm = nn.RMSNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.key_norm = nn.Parameter(torch.ones(self.head_dim)) if config.qk_norm else None
        self.merge = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=EPS)
        self.mlp_in = nn.Linear(width, hidden * (2 if self.gated else 1), bias=False)
        self.mlp_out = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: Tables,
        *,
        window: int | None = None,
        memory: Tensor | None = None,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, N, width) -> (B, N, width).

        Args:
            rotary: cos and sin for the positions of ``memory`` and x, (M + N, head_dim / 2), or (B, N, head_dim / 2).
            window: number of tokens before its own that a token attends to; default all.
            memory: (B, M, width), the block's input for the tokens before x; all of x attends to all of it.
            cache: keys and values of the tokens before x, in place of ``memory`` and ``window``.
            mask: mask for ``cache``.
        """
        p = self.dropout if self.training else 0.0
        before = 0 if memory is None else memory.size(1)
        query, key, value = project_heads(  # (B, heads, M + N, head_dim) each, with QK-norm and RoPE
            self,
            ("qkv",),
            self.attention_norm(x if memory is None else torch.cat((memory, x), dim=1)),
            heads=(self.heads,) * 3,
            head_dims=(self.head_dim,) * 3,
            norms=() if self.query_norm is None or self.key_norm is None else (self.query_norm, self.key_norm),
            rotary=rotary,
        )
        if cache is None:
            heads = functional.scaled_dot_product_attention(
                query[:, :, before:], key, value, dropout_p=p, window=(window, before)
            )
        else:
            dtype = cache.keys.dtype
            keys, values = cache.append(key.to(dtype), value.to(dtype))
            heads = functional.scaled_dot_product_attention(query.to(dtype), keys, values, attn_mask=mask)
        merged = merge_heads(self, "merge", cast(Tensor, heads), residual=None if p else x)
        x = x + F.dropout(merged, p) if p else merged
        branch: Tensor = self.mlp_out(self.activate(self.mlp_in(self.mlp_norm(x))))
        return x + (F.dropout(branch, p) if p else branch)

    def activate(self, hidden: Tensor) -> Tensor:
        """GELU, or SwiGLU of the halves (gate, value)."""
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return F.silu(gate) * hidden
        return F.gelu(hidden)


def init_weights(model: nn.Module, width: int, depth: int) -> None:
    """Matrices from N(0, 1 / width); those that end a residual branch are scaled by 1 / sqrt(2 depth)."""
    std = width**-0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("merge.weight", "mlp_out.weight"))
            nn.init.normal_(parameter, std=std * (2 * depth) ** -0.5 if residual else std)


class CachedBlocks:
    """Runs blocks over a text in parts, with a KV cache for each block; single tokens in few calls (``TokenStep``).

    Args:
        blocks: an ``nn.ModuleList`` of ``LMBlock``.
        rotary: rotary embedding of their heads.
        batch: B.
        max_length: size of the caches.
        like: tensor in device and dtype of the caches, unless autocast has another dtype.
        padding: number of padding tokens on the left of each row of the first part; default none.
        window, segment: arguments of ``KVCache``.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        rotary: RotaryEmbedding,
        batch: int,
        max_length: int,
        like: Tensor,
        *,
        padding: Sequence[int] | None = None,
        window: int | None = None,
        segment: int | None = None,
    ) -> None:
        device = like.device
        dtype = autocast_dtype(like) or like.dtype
        self.blocks, self.rotary = cast(Sequence[LMBlock], blocks), rotary
        first = self.blocks[0]
        sizes = (batch, first.heads, max_length, first.head_dim)
        self.caches = [KVCache(*sizes, window=window, segment=segment, device=device, dtype=dtype) for _ in blocks]
        self.padded = padding is not None and any(padding)
        if self.padded:
            for cache in self.caches:
                cache.reset(torch.tensor(padding, device=device))
        self._steps: list[TokenStep | None] = []
        self._tables: Tables | None = None

    @property
    def room(self) -> int:
        """Number of tokens that can be read at once."""
        return self.caches[0].room

    def __call__(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, N, width), which follow those in the caches -> hidden states (B, N, width)."""
        length = x.size(1)
        for cache in self.caches:
            cache.make_room(length)
        mask, (cos, sin) = self.caches[0].mask(length), self._rotation(x)
        single = length == 1 and not x.requires_grad  # a block refuses what requires grad
        if single and not self._steps:
            pairs = zip(self.blocks, self.caches, strict=True)
            self._steps = [TokenStep(block, cache) if TokenStep.fits(block) else None for block, cache in pairs]
        steps = self._steps if single else [None] * len(self.caches)
        half = cos.size(-1) // 2
        for block, cache, step in zip(self.blocks, self.caches, steps, strict=True):
            if step is None:
                x = block(x, (cos[..., :half], sin[..., half:]), cache=cache, mask=mask)
            else:
                x = step(x, cos, sin, mask)
        return x

    def _rotation(self, x: Tensor) -> Tables:
        """(cos, cos) and (-sin, sin) of the next positions, (N, head_dim), or (B, N, head_dim) where padded."""
        first = self.caches[0]
        end = first.num_tokens + x.size(1)
        if self._tables is None or len(self._tables[0]) < end:
            dtype = torch.promote_types(x.dtype, torch.float32)
            cos, sin = self.rotary.tables(1 << (end - 1).bit_length(), device=x.device, dtype=dtype)
            self._tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        cos, sin = self._tables
        if not self.padded:
            return cos[first.num_tokens : end], sin[first.num_tokens : end]
        positions = first.positions(x.size(1))
        return cos[positions], sin[positions]


class TokenStep:
    """``LMBlock.forward`` for one token of each sequence in few calls, which cost more than their arithmetic here.

    The weights are read once; the sublayers are not called.
    """

    def __init__(self, block: LMBlock, cache: KVCache) -> None:
        self.cache, self.dtype, self.activate = cache, cache.keys.dtype, block.activate
        self.heads, self.head_dim = block.heads, block.head_dim
        self.attention_norm, self.mlp_norm = block.attention_norm.weight, block.mlp_norm.weight
        self.qkv, self.merge = block.qkv.weight, block.merge.weight
        self.mlp_in, self.mlp_out = block.mlp_in.weight, block.mlp_out.weight
        self.qk_norm: Tensor | None = None
        if block.query_norm is not None and block.key_norm is not None:
            self.qk_norm = torch.stack((block.query_norm, block.key_norm)).view(2, 1, 1, -1)
        self.eps = torch.full((), EPS, device=self.qkv.device, dtype=self.attention_norm.dtype)

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether calling the block and its sublayers would compute nothing but what their weights say."""
        if not isinstance(block, LMBlock) or type(block).forward is not LMBlock.forward or not is_unhooked(block):
            return False
        maps, norms = (block.qkv, block.merge, block.mlp_in, block.mlp_out), (block.attention_norm, block.mlp_norm)
        return all(is_pointwise(module) and module.bias is None for module in maps) and all(
            is_fusible(norm, nn.RMSNorm.forward) and norm.eps == EPS and norm.weight is not None for norm in norms
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, 1, width) -> (B, 1, width).

        Args:
            cos, sin: (cos, cos) and (-sin, sin), so that RoPE is x * cos + roll(x) * sin: (1, head_dim), or
                (B, 1, head_dim) where padded.
            mask: mask for the cache.
        """
        x = x.squeeze(1)
        qkv = F.linear(_rms_norm(x, self.attention_norm, self.eps), self.qkv)
        qkv = qkv.to(x.dtype).view(len(x), 3, self.heads, 1, self.head_dim)
        query_key, value = qkv.narrow(1, 0, 2), qkv.select(1, 2)
        if self.qk_norm is not None:
            query_key = _rms_norm(query_key, self.qk_norm, self.eps)
        cos, sin = cos.view(-1, 1, 1, 1, self.head_dim), sin.view(-1, 1, 1, 1, self.head_dim)
        query_key = torch.addcmul(query_key * cos, query_key.roll(self.head_dim // 2, -1), sin)
        query_key = query_key.to(self.dtype)
        keys, values = self.cache._append(query_key.select(1, 1), value)
        heads = F.scaled_dot_product_attention(query_key.select(1, 0), keys, values, attn_mask=mask)
        x = x + F.linear(heads.reshape(x.shape), self.merge)
        hidden = F.linear(_rms_norm(x, self.mlp_norm, self.eps), self.mlp_in)
        return (x + F.linear(self.activate(hidden), self.mlp_out)).unsqueeze(1)


def _rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm over the last dim in few calls. ``eps``: a tensor of no dims."""
    if x.element_size() < 4:  # a sum of squares in half precision overflows
        upcast = x.float()
        mean = upcast.square().mean(-1, keepdim=True)
        return (upcast * torch.rsqrt(mean + EPS)).to(x.dtype) * weight
    square = torch.linalg.vecdot(x, x).unsqueeze(-1)
    return x.mul(torch.add(eps, square, alpha=1 / x.size(-1)).rsqrt_()).mul_(weight)
