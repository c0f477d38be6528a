"""Where a token stands: sinusoids that are added, rotations of queries and keys, and biases of the scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen import checks as check
from fastgen import functional
from fastgen.nn._buffers import ComputedBuffers

__all__ = ["PositionalEncoding", "RelativePositionBias", "RotaryEmbedding"]


def _require_not_negative(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")


def _require_base(base: float) -> None:
    if isinstance(base, bool) or not isinstance(base, (int, float)) or not 1 < base < math.inf:
        raise ValueError(f"base: expected a finite number > 1, got {base!r}")


def _require_positions(positions: Tensor, batch: int, length: int) -> None:
    check.require_tensor("positions", positions)
    if positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(f"positions: expected an integer tensor, got {positions.dtype}")
    if tuple(positions.shape) not in ((length,), (batch, length)):
        raise ValueError(
            f"positions: expected (N,) = ({length},) or (B, N) = ({batch}, {length}), got {check.shape_of(positions)}"
        )


# --------------------------------------------------------------------------------------------------
# Added to the tokens


def _sinusoids(length: int, dim: int, base: float) -> Tensor:
    """sin and cos of each position in turn, (length, dim) in float64; an odd dim ends with a sin."""
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim]


class PositionalEncoding(ComputedBuffers):
    """Adds sines and cosines of the position, ``x + table``, with table[p, 2i] = sin(p / base^(2i / dim)), cos beside.

    Vaswani et al., "Attention is all you need" (2017), section 3.5.

    Args:
        dim: channels of a token. Where it is odd the last one has a sine and no cosine.
        max_len: positions that the table holds.
        dropout: probability of dropping an element of the sum in training, as in the paper.
        batch_first: tokens are (B, N, dim), else (N, B, dim).
        base: 10000 in the paper.

    The table is no part of the state dict, and is made anew, exactly rounded, when the module changes its dtype.

    Raises:
        ValueError: a count that is not positive, a probability or a base out of range.

    Example:
        >>> PositionalEncoding(4)(torch.zeros(1, 2, 4))[0, 0]
        tensor([0., 1., 0., 1.])
    """

    table: Tensor

    def __init__(
        self,
        dim: int,
        max_len: int = 5000,
        dropout: float = 0.0,
        *,
        batch_first: bool = True,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.require_positive("dim", dim)
        check.require_positive("max_len", max_len)
        check.require_probability("dropout", dropout)
        _require_base(base)
        self.dim, self.max_len, self.batch_first, self.base = dim, max_len, batch_first, base
        self.dropout = nn.Dropout(dropout)
        self._register_computed(device, torch.get_default_dtype() if dtype is None else dtype)

    def _computed(self) -> dict[str, Tensor]:
        return {"table": _sinusoids(self.max_len, self.dim, self.base)}

    def extra_repr(self) -> str:
        return f"{self.dim}, max_len={self.max_len}, batch_first={self.batch_first}"

    def forward(self, x: Tensor, offset: int = 0, *, positions: Tensor | None = None) -> Tensor:
        """Add.

        Args:
            x: (B, N, dim), or (N, B, dim) without ``batch_first``.
            offset: position of the first token, where those before it are in a cache.
            positions: (N,) or (B, N) integers on x's device instead, such as ``KVCache.positions`` gives. On a GPU one
                that is negative, or not below max_len, is an error of the device: nothing waits for it.

        Returns:
            Like x.

        Raises:
            TypeError: x is not a floating tensor, or positions are not integers.
            ValueError: x or positions have another shape, or a position is negative or not below max_len.
        """
        check.require_tensor("x", x)
        check.require_floating("x", x)
        if x.dim() != 3 or x.size(-1) != self.dim:
            layout = "(B, N, dim)" if self.batch_first else "(N, B, dim)"
            raise ValueError(f"x: expected {layout} with dim = {self.dim}, got {check.shape_of(x)}")
        batch, length = (x.size(0), x.size(1)) if self.batch_first else (x.size(1), x.size(0))
        if self.table.is_meta and not x.is_meta:  # a state dict has no entry that would tell where to go
            self._leave_meta(x.device)
        if positions is None:
            _require_not_negative("offset", offset)
            if offset + length > self.max_len:
                raise ValueError(
                    f"x: expected at most max_len = {self.max_len} positions, got {length} after offset {offset};"
                    " build the layer with a larger max_len"
                )
            table = self.table[offset : offset + length]
        else:
            _require_positions(positions, batch, length)
            table = self._at(positions)
        if not self.batch_first:
            table = table.unsqueeze(1) if table.dim() == 2 else table.transpose(0, 1)
        result: Tensor = self.dropout(x + table.to(x.dtype))
        return result

    def _at(self, positions: Tensor) -> Tensor:
        index = positions.long()
        try:
            return self.table[torch.where(index < 0, self.max_len, index)]  # -1 would be the last row
        except IndexError as error:
            raise ValueError(
                f"positions: expected 0 to max_len - 1 = {self.max_len - 1}, got {int(positions.min())} to"
                f" {int(positions.max())}"
            ) from error


# --------------------------------------------------------------------------------------------------
# Rotations


Tables = tuple[Tensor, Tensor]


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels of queries and keys by angles that grow with the position.

    Su et al., "RoFormer: enhanced Transformer with rotary position embedding" (2021), section 3.2.2: pair i at position
    p turns by ``p * base^(-2i / dim)``, so that a score depends on the distance of query and key alone.

    Args:
        dim: how many channels of a head are rotated, even: the first ones; the others pass.
        base: 10000 in the paper. A larger one reaches further.
        interleaved: pairs are channels (2i, 2i + 1), as in the paper; else (i, i + dim / 2), as in Llama.
        scaling: positions are divided by it, to run a model at lengths beyond those of its training (Chen et al.,
            "Extending context window of large language models via positional interpolation", 2023).

    Tables are computed in float64 and handed out in float32, whatever dtype the module has; those of a step without
    explicit positions are kept and grow with the length. Positions may be negative: the angle is then negative. Has no
    parameters.

    Raises:
        ValueError: an odd dim, or a base or scaling out of range.

    Example:
        >>> rotary = RotaryEmbedding(8)
        >>> query, key = rotary(torch.randn(2, 4, 5, 8), torch.randn(2, 1, 5, 8), offset=3)
        >>> query.shape, key.shape
        (torch.Size([2, 4, 5, 8]), torch.Size([2, 1, 5, 8]))
    """

    def __init__(self, dim: int, *, base: float = 10000.0, interleaved: bool = False, scaling: float = 1.0) -> None:
        super().__init__()
        check.require_positive("dim", dim)
        if dim % 2 != 0:
            raise ValueError(f"dim: expected an even number, got {dim}")
        _require_base(base)
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not 0 < scaling < math.inf:
            raise ValueError(f"scaling: expected a finite number > 0, got {scaling!r}")
        self.dim, self.base, self.interleaved, self.scaling = dim, base, interleaved, scaling
        self._kept: dict[tuple[torch.device, torch.dtype], Tables] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, interleaved={self.interleaved}, scaling={self.scaling}"

    def _compute(self, positions: Tensor, dtype: torch.dtype) -> Tables:
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        pairs = torch.arange(0, self.dim, 2, device=positions.device, dtype=exact)
        angles = positions.to(exact).unsqueeze(-1) * (self.base ** (-pairs / self.dim) / self.scaling)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def tables(
        self,
        length: int,
        offset: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tables:
        """cos and sin, (length, dim / 2) each, for ``functional.rotary_embedding`` and ``functional.qkv_projection``.

        They are the caller's own: what is written to them changes no other.

        Args:
            length: number of positions.
            offset: the first of them.
            device: default that of ``torch.get_default_device``.
            dtype: float64 for float64 queries.

        Raises:
            ValueError: a negative length or offset.
        """
        where = torch.get_default_device() if device is None else torch.device(device)
        cos, sin = self._views(length, offset, where, dtype)
        return (cos, sin) if torch.compiler.is_compiling() else (cos.clone(), sin.clone())

    def _views(self, length: int, offset: int, where: torch.device, dtype: torch.dtype) -> Tables:
        """``tables``, parts of those kept, for those who only read them."""
        _require_not_negative("length", length)
        _require_not_negative("offset", offset)
        end = offset + length
        # A captured graph reads its memory at every replay, when longer tables may have replaced those kept; a mode
        # (FakeTensorMode) makes tensors of its own.
        captured = where.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or captured or torch._C._len_torch_dispatch_stack() > 0:
            return self._compute(torch.arange(offset, end, device=where), dtype)
        kept = self._kept.get((where, dtype))
        if kept is None or kept[0].size(0) < end:
            with torch.inference_mode(False):  # training may use them later
                kept = self._compute(torch.arange(1 << (end - 1).bit_length() if end else 0, device=where), dtype)
            self._kept[where, dtype] = kept
        return kept[0][offset:end], kept[1][offset:end]

    def forward(
        self, query: Tensor, key: Tensor, *, offset: int = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rotate both.

        Args:
            query: (B, H, N, D), D at least dim.
            key: (B, Hk, N, D), at the positions of query.
            offset: position of the first token, where those before it are in a cache.
            positions: (N,) or (B, N) integers on query's device instead, such as ``KVCache.positions`` gives.

        Returns:
            Both, rotated, in their shapes and dtypes.

        Raises:
            TypeError: query or key are not floating tensors, or positions are not integers.
            ValueError: shapes that do not fit, or a negative offset.
        """
        for name, tensor in (("query", query), ("key", key)):
            check.require_tensor(name, tensor)
            check.require_floating(name, tensor)
            if tensor.dim() != 4 or tensor.size(-1) < self.dim:
                raise ValueError(
                    f"{name}: expected (B, H, N, D) with D >= dim = {self.dim}, got {check.shape_of(tensor)}"
                )
        if (query.size(0), query.size(2)) != (key.size(0), key.size(2)):
            raise ValueError(
                f"key: expected query's batch and length {(query.size(0), query.size(2))}, got {check.shape_of(key)}"
            )
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        if positions is None:
            cos, sin = self._views(query.size(2), offset, query.device, dtype)
        else:
            _require_positions(positions, query.size(0), query.size(2))
            cos, sin = self._compute(positions, dtype)
        return (
            functional.rotary_embedding(query, cos, sin, interleaved=self.interleaved),
            functional.rotary_embedding(key, cos, sin, interleaved=self.interleaved),
        )


# --------------------------------------------------------------------------------------------------
# Added to the scores


def _bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Distances below half of the buckets have one each; the others share the rest, in steps of the logarithm.

    In float32, as T5 computes it: a distance at the edge of a bucket falls where T5's weights expect it.
    """
    exact = num_buckets // 2
    large = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return torch.where(distance < exact, distance, (exact + large.long()).clamp(max=num_buckets - 1))


class RelativePositionBias(ComputedBuffers):
    """A learned number for each head and bucket of distances between key and query, to be added to the scores.

    Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text Transformer" (2020),
    section 2.1. T5's scores have no 1 / sqrt(D): pass ``scale=1.0`` to attention to run its weights.

    Args:
        num_heads: H.
        num_buckets: how many numbers a head has.
        max_distance: distances from here on share the last bucket.
        bidirectional: keys before and after the query have half of the buckets each; else (a decoder) keys after it
            all count as distance 0.

    Returns:
        (H, N, M), for ``attn_mask`` of ``functional.scaled_dot_product_attention``.

    The state dict has ``weight`` (num_buckets, H), T5's ``relative_attention_bias.weight``.

    Raises:
        ValueError: no heads, too few buckets, or max_distance not beyond the buckets of single distances.

    Example:
        >>> RelativePositionBias(8)(5, 7).shape
        torch.Size([8, 5, 7])
    """

    bucket_of_distance: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check.require_positive("num_heads", num_heads)
        check.require_positive("num_buckets", num_buckets)
        check.require_positive("max_distance", max_distance)
        least = 4 if bidirectional else 2
        if num_buckets < least or (bidirectional and num_buckets % 2 != 0):
            wanted = "an even number >= 4 (bidirectional)" if bidirectional else "an integer >= 2"
            raise ValueError(f"num_buckets: expected {wanted}, got {num_buckets}")
        one_way = num_buckets // 2 if bidirectional else num_buckets
        if max_distance <= one_way // 2:
            raise ValueError(f"max_distance: expected more than {one_way // 2}, got {max_distance}")
        self.num_heads, self.num_buckets, self.max_distance = num_heads, num_buckets, max_distance
        self.bidirectional = bidirectional
        self.weight = nn.Parameter(torch.empty(num_buckets, num_heads, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self._register_computed(self.weight.device)

    def _computed(self) -> dict[str, Tensor]:
        """Of distances from -max_distance to max_distance. A logarithm on the CPU has the same bits for all devices."""
        distance = torch.arange(-self.max_distance, self.max_distance + 1)
        if self.bidirectional:
            one_way = self.num_buckets // 2
            bucket = _bucket(distance.abs(), one_way, self.max_distance) + (distance > 0) * one_way
        else:
            bucket = _bucket((-distance).clamp(min=0), self.num_buckets, self.max_distance)
        return {"bucket_of_distance": bucket}

    def extra_repr(self) -> str:
        return (
            f"{self.num_heads}, num_buckets={self.num_buckets}, max_distance={self.max_distance},"
            f" bidirectional={self.bidirectional}"
        )

    def forward(self, query_length: int, key_length: int, offset: int | Tensor = 0) -> Tensor:
        """The bias.

        Args:
            query_length: N. key_length: M, keys 0 to M - 1.
            offset: position of the first query among the keys: a number, or an integer tensor of one element on the
                layer's device, such as ``KVCache.position``.

        Returns:
            (H, N, M).

        Raises:
            TypeError: an offset that is no integer. ValueError: a length or offset out of range.
        """
        check.require_positive("query_length", query_length)
        check.require_positive("key_length", key_length)
        if isinstance(offset, Tensor):
            if offset.is_floating_point() or offset.dtype == torch.bool:
                raise TypeError(f"offset: expected an integer tensor, got {offset.dtype}")
            if offset.numel() != 1:
                raise ValueError(f"offset: expected one element, got {check.shape_of(offset)}")
            offset = offset.reshape(())
        else:
            _require_not_negative("offset", offset)
        # All that is looked up is one number for each diagonal; row i of the result is a window of them.
        distance = torch.arange(1 - query_length, key_length, device=self.weight.device) - offset
        bucket = self.bucket_of_distance[distance.clamp(-self.max_distance, self.max_distance) + self.max_distance]
        diagonals = self.weight[bucket].t()
        if torch.compiler.is_exporting():  # unfold would make the length a constant
            first = torch.arange(query_length - 1, -1, -1, device=bucket.device)
            return diagonals[:, first[:, None] + torch.arange(key_length, device=bucket.device)]
        return diagonals.unfold(1, key_length, 1).flip(1)
