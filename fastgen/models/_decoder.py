"""The block of decoder-only Transformers, its initial weights, and what it keeps of the tokens it has read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import functional
from fastgen.nn._sublayers import is_fusible, is_pointwise, merge_heads, project_heads

Tables: TypeAlias = tuple[Tensor, Tensor]
EPS = 1e-6


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


class Past:
    """Keys and values of the tokens that a decoder has read, of all its blocks; the oldest make room for new ones.

    Args:
        config: of the decoder.
        batch: B, rows.
        slots: tokens of a row that there is room for.
        like: a tensor whose device the buffers have, and whose dtype unless autocast has another.
        padding: how many tokens each row of what is read first has before its own, on the left; default none.
        first_visible: position -> that of the first token it sees; for integers and tensors. Default: it sees all.
        reach: how far back that may be. When the slots are full, so many tokens are kept. None: all of them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        slots: int,
        like: Tensor,
        *,
        padding: Sequence[int] | None = None,
        first_visible: Callable[[Any], Any] | None = None,
        reach: int | None = None,
    ) -> None:
        device = like.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else like.dtype
        shape = (batch, config.heads, slots, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.depth)] for _ in range(2)
        )
        self.padding = torch.tensor(padding, device=device)[:, None] if padding and any(padding) else None
        self.first_visible, self.reach, self.slots = first_visible, reach, slots
        self.forgotten = self.begin = self.low = self.end = 0
        self.mask: Tensor | None = None
        self.eps = torch.full((), EPS, device=device, dtype=like.dtype)
        self.norms: dict[int, Tensor] = {}  # of queries and keys, of a block
        self.fused: dict[int, bool] = {}  # whether a block may take its step of one token in one piece
        self._rotations: tuple[Tables, Tables] | None = None

    @property
    def room(self) -> int:
        """How many tokens can be read at once."""
        return self.slots - (self.end if self.reach is None else min(self.end, self.reach))

    def open(self, count: int) -> Tensor | int:
        """Makes room for the next ``count`` tokens; their positions: (count,) or (B, count), of one token an integer.

        What is padding has a negative position.
        """
        if count > self.room:
            raise ValueError(
                f"tokens: expected at most {self.room} at once, as there are {self.slots} slots, got {count}"
            )
        if self.end + count > self.slots:
            self._forget(self.end - cast(int, self.reach))
        self.begin, self.low, self.end = self.end, 0, self.end + count
        first = self.forgotten + self.begin
        if count == 1 and self.padding is None:
            if self.first_visible is not None:
                self.low = max(0, self.first_visible(first) - self.forgotten)
            self.mask = None
            return first
        places = torch.arange(self.forgotten, self.forgotten + self.end, device=self.keys[0].device)
        keys = places if self.padding is None else places - self.padding
        queries = keys[..., self.begin :]
        key, query = keys.unsqueeze(-2), queries.unsqueeze(-1)
        mask = (key <= query) & (key >= 0)
        if self.first_visible is not None:
            mask = mask & (key >= self.first_visible(query))
        self.mask = mask if self.padding is None else mask.unsqueeze(1)
        return queries

    def _forget(self, count: int) -> None:
        for buffer in (*self.keys, *self.values):
            kept = buffer[:, :, count : self.end].clone()
            buffer[:, :, : kept.size(2)] = kept
        self.forgotten, self.end = self.forgotten + count, self.end - count

    def rotation(self, rotary: Tables) -> Tables:
        """Tables of one position, for all its channels and blocks: a head turns to head * cos + rolled head * sin."""
        if self._rotations is None or self._rotations[0] is not rotary:
            cos, sin = (table.reshape(-1, 1, 1, 1, table.size(-1)) for table in rotary)
            self._rotations = rotary, (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
        return self._rotations[1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of the opened tokens' queries in a block, (B, H, count, D), to all they see; keeps their keys."""
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.begin, key.size(2)).copy_(key)
        values.narrow(2, self.begin, key.size(2)).copy_(value)
        keys, values = (buffer.narrow(2, self.low, self.end - self.low) for buffer in (keys, values))
        query = query.to(keys.dtype)
        if query.size(2) == 1:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask)
        return cast(Tensor, functional.scaled_dot_product_attention(query, keys, values, attn_mask=self.mask))


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_dim
        self.heads, self.head_dim, self.dropout = config.heads, config.head_dim, config.dropout
        self.gated = config.activation == "swiglu"
        self.attention_norm = nn.RMSNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(self.head_dim)) if config.normalise_heads else None
        self.key_norm = nn.Parameter(torch.ones(self.head_dim)) if config.normalise_heads else None
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
        past: Past | None = None,
        layer: int = 0,
    ) -> Tensor:
        """x (B, N, width) -> the same.

        Args:
            rotary: tables of the positions of ``memory`` and x.
            window: how many tokens before its own each sees; default all.
            memory: (B, M, width), what stood here before x: seen by all of x.
            past: of the tokens before x, in its stead; it has been opened for x and knows this block as ``layer``.
        """
        p = self.dropout if self.training else 0.0
        if past is not None and x.size(1) == 1:
            if layer not in past.fused:
                past.fused[layer] = self._may_be_fused()
            if past.fused[layer]:
                return self._step(x, rotary, past, layer)
        before = 0 if memory is None else memory.size(1)
        query, key, value = project_heads(
            self,
            ("qkv",),
            self.attention_norm(x if memory is None else torch.cat((memory, x), dim=1)),
            heads=(self.heads,) * 3,
            head_dims=(self.head_dim,) * 3,
            norms=() if self.query_norm is None or self.key_norm is None else (self.query_norm, self.key_norm),
            rotary=rotary,
        )
        if past is None:
            heads = functional.scaled_dot_product_attention(
                query[:, :, before:], key, value, dropout_p=p, window=(window, before)
            )
        else:
            heads = past.attend(layer, query, key, value)
        heads = cast(Tensor, heads)
        merged = merge_heads(self, "merge", heads, residual=None if p else x)
        x = x + F.dropout(merged, p) if p else merged
        branch: Tensor = self.mlp_out(self._activated(self.mlp_in(self.mlp_norm(x))))
        return x + (F.dropout(branch, p) if p else branch)

    def _activated(self, hidden: Tensor) -> Tensor:
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            return F.silu(gate) * hidden
        return F.gelu(hidden)

    def _may_be_fused(self) -> bool:
        """Whether ``_step`` may read the weights of all sublayers without calling them."""
        maps = (self.qkv, self.merge, self.mlp_in, self.mlp_out)
        norms = (self.attention_norm, self.mlp_norm)
        return all(is_pointwise(module) and module.bias is None for module in maps) and all(
            is_fusible(norm, nn.RMSNorm.forward) and norm.eps == EPS and norm.weight is not None for norm in norms
        )

    def _step(self, x: Tensor, rotary: Tables, past: Past, layer: int) -> Tensor:
        """``forward`` of one token of each row, in few calls: at this size they cost more than their arithmetic."""
        x = x.squeeze(1)
        heads = F.linear(_rms_norm(x, self.attention_norm.weight, past.eps), self.qkv.weight)
        heads = heads.to(x.dtype).view(len(x), 3, self.heads, 1, self.head_dim)
        turned, value = heads.narrow(1, 0, 2), heads.select(1, 2)
        if self.query_norm is not None and self.key_norm is not None:
            if layer not in past.norms:
                past.norms[layer] = torch.stack((self.query_norm, self.key_norm)).view(2, 1, 1, -1)
            turned = _rms_norm(turned, past.norms[layer], past.eps)
        cos, sin = past.rotation(rotary)
        turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, -1), sin)
        attended = past.attend(layer, turned.select(1, 0), turned.select(1, 1), value)
        x = x + F.linear(attended.reshape(x.shape), self.merge.weight)
        hidden = F.linear(_rms_norm(x, self.mlp_norm.weight, past.eps), self.mlp_in.weight)
        return (x + F.linear(self._activated(hidden), self.mlp_out.weight)).unsqueeze(1)


def _rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    if x.element_size() < 4:  # a sum of squares in half precision overflows
        wide = x.float()
        mean = wide.square().mean(-1, keepdim=True)
        return (wide * torch.rsqrt(mean + EPS)).to(x.dtype) * weight
    square = torch.linalg.vecdot(x, x).unsqueeze(-1)
    return x.mul(torch.add(eps, square, alpha=1 / x.size(-1)).rsqrt_()).mul_(weight)


@contextmanager
def drawing(model: nn.Module) -> Iterator[None]:
    """In evaluation, without compiled code, since each length would be compiled anew, and without autograd.

    Weights that are spread over processes are gathered when needed, and kept, which inference mode would spoil.
    """
    whole = all(type(weight) is nn.Parameter for weight in model.parameters())
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode() if whole else torch.no_grad():
            yield
    finally:
        model.train(was_training)


def initialise_decoder(model: nn.Module, config: DecoderConfig) -> None:
    """Matrices from N(0, 1 / width); what is added to the residual stream is smaller by the root of how often it is."""
    std = config.width**-0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            added = name.endswith(("merge.weight", "mlp_out.weight"))
            nn.init.normal_(parameter, std=std * (2 * config.depth) ** -0.5 if added else std)
