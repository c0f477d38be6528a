"""Learned relative position bias of attention scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgen import checks as check
from fastgen.nn._buffers import ComputedBuffers
from fastgen.nn._checks import require_nonnegative

__all__ = ["RelativePositionBias"]


def _bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance: half of the buckets hold one distance each, the other half is spaced logarithmically.

    Computed in float32 as in T5, so that distances at the edge of a bucket are assigned to the same bucket.
    """
    exact = num_buckets // 2
    large = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    return torch.where(distance < exact, distance, (exact + large.long()).clamp(max=num_buckets - 1))


class RelativePositionBias(ComputedBuffers):
    """Relative position bias of T5: one learned value per head and bucket of distances between key and query.

    Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text Transformer" (2020),
    section 2.1. The bias is passed as ``attn_mask`` to ``functional.scaled_dot_product_attention``. T5 does not scale
    its scores by 1 / sqrt(D): pass ``scale=1.0`` to attention to use T5's weights.

    The state dict has the key ``weight`` (num_buckets, H), which is T5's ``relative_attention_bias.weight``.

    Args:
        num_heads: number of heads H.
        num_buckets: number of buckets.
        max_distance: distance from which on all keys are in the last bucket.
        bidirectional: if True (encoder), keys before and after the query use half of the buckets each. If False
            (decoder), all keys after the query are in the bucket of distance 0.

    Raises:
        ValueError: if ``num_heads`` is not positive, there are too few buckets, or ``max_distance`` is not larger than
            the distances that have a bucket of their own.

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
        """Buckets of the distances from -max_distance to max_distance, computed on the CPU for all devices."""
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
        """Computes the bias.

        Args:
            query_length: number of queries N.
            key_length: number of keys M, at positions 0 to M - 1.
            offset: position of the first query: an integer, or an integer tensor with one element on the device of
                the layer, such as ``KVCache.position``.

        Returns:
            The bias, (H, N, M).

        Raises:
            TypeError: if ``offset`` is a tensor of another dtype.
            ValueError: if a length or the offset is out of range.
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
            require_nonnegative("offset", offset)
        # The bias is constant along diagonals: look up one value per diagonal; each row is a window of these values.
        distance = torch.arange(1 - query_length, key_length, device=self.weight.device) - offset
        bucket = self.bucket_of_distance[distance.clamp(-self.max_distance, self.max_distance) + self.max_distance]
        diagonals = self.weight[bucket].t()
        if torch.compiler.is_exporting():  # unfold would specialize the length
            first = torch.arange(query_length - 1, -1, -1, device=bucket.device)
            return diagonals[:, first[:, None] + torch.arange(key_length, device=bucket.device)]
        return diagonals.unfold(1, key_length, 1).flip(1)
